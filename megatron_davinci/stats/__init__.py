"""Noise, trends and saturation of what a run measures: for the controller, evaluation and the lab. No torch."""
