"""Metrics, loggers and curves of a run."""
