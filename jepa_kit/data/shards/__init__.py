"""Find, index and read shards."""
