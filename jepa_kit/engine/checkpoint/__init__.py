"""Write, find, check and read checkpoints."""
