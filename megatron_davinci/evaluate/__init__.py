"""Measuring models: held-out loss, and the n-gram baselines that it is held against."""
