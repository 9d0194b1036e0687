"""Measure collapse."""
