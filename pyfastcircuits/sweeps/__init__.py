"""Sweeps over whole corpora: cut into chunks, stored as they go, resumed, stopped when the ranking is settled."""
