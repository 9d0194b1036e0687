"""Training: step and loop, optimiser and schedules, checkpoints, processes, telemetry. Start at loop.py."""
