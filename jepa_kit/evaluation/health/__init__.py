"""Measure the health of a representation: collapse, rank, and whether predictions depend on the image."""
