"""Synthetic scenes: rendered images with exact labels."""
