"""Weights in and out: the names of other code bases, and back."""
