"""Training: set-up, steps, optimiser, schedules, checkpoints, logging. Start at train.py."""
