"""Where clips come from: each source turns games, files or other shards into samples for the shard writer."""
