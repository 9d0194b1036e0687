"""Write results of evaluations, read them back, and compare runs in tables."""
