"""Processes of a run: start, collectives, signals and agreement."""
