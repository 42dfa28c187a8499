"""Shards on disk -> `Clip` batches on every rank."""
