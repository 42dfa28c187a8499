"""Samples -> a set of shards: encoding, checking, building in parallel, and looking a set over."""
