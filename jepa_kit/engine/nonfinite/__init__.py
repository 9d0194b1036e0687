"""Detect losses and gradients that are not finite, and handle them."""
