"""Fetch, cache and prefetch remote shards."""
