"""Bounds of scratch memory, in one place: what runs and experiments take beyond weights, a trace and their results."""

SCRATCH_BYTES = 128 << 20  # the promise for an experiment, whatever the number of ablations
BLOCK_BYTES = SCRATCH_BYTES // 12  # at most a dozen blocks are alive: of deltas and their copies, of bases, of packing
CLEAN_LOGITS_BYTES = 4 * SCRATCH_BYTES  # clean logits held at a time beside the scratch, at least one sequence's
ROWS = 4096  # positions worked on at a time, at least one sequence's: enough for products to run at their full rate
