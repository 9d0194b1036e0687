"""Write and verify shards."""
