"""A kernel that only takes powers of 2: the denominator of a sweep's speed."""

import triton
import triton.language as tl

SIZE, REPEATS = 1024, 4096
_SIZE, _REPEATS = tl.constexpr(SIZE), tl.constexpr(REPEATS)


@triton.jit
def exp_kernel(out):
    """out [programs * SIZE] = exp2 of itself, REPEATS times over."""
    lane = tl.arange(0, _SIZE)
    x = lane / _SIZE
    for _ in range(_REPEATS):
        x = tl.exp2(x * -1.0)
    tl.store(out + tl.program_id(0) * _SIZE + lane, x)
