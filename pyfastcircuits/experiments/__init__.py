"""Experiments: they take something out of a run, or put something into it, and measure the change."""
