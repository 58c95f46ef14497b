"""The training run: the loop, the step, checkpoints, records, launching."""
