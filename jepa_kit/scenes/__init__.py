"""Synthetic scenes: images whose contents are known exactly."""
