"""Report on maskers."""
