"""Optimizers, and the schedules of learning rate and batch size."""
