"""Sweeps at scale: what one costs before it runs, and how processes share it."""
