"""Report on maskers: statistics, costs, warnings and pictures of the masks that they draw."""
