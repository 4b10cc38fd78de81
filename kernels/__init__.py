"""Triton kernels: the tile core, one file per op, and the block sizes they run with."""
