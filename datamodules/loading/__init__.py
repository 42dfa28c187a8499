"""A set of shards -> batches: the plan, random access, decoding, and the pipelines in loader workers."""
