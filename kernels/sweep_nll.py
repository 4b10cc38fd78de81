"""sweep_nll on the tile core: the epilogue keeps a running maximum and sum of exponentials of every row.

A block's rows are BLOCK_P ablations x BLOCK_T positions: ablations at the same position share a row of clean logits,
those of one group a tile of the basis. Each split of the vocabulary leaves partial results, joined in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.configs import arithmetic, choose
from pyfastcircuits.kernels.tile import load_left, multiply

__all__ = ["sweep_nll_triton"]

LOG2E = tl.constexpr(1.4426950408889634)
ALIGNMENT = 16  # elements between rows of the basis, so that loads are wide and can run ahead


@triton.jit
def _reference(highest):
    """Exponentials are powers of 2 relative to this; an infinite maximum leaves them as they are: sums of 0 or inf."""
    return tl.where(tl.abs(highest) < float("inf"), highest * LOG2E, 0.0)


@triton.jit
def _logits(
    base,  # [M] pointers
    scale,  # [M] or None
    total,  # [M, N] zeros
    left,
    rows,
    start,
    stride,
    columns,  # [N]
    end,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Clean logits, what the ablation adds and the ablated logits, [M, N] each; -inf in columns from `end` on."""
    # Added to the base afterwards: a sum that starts from a large logit would round at every step.
    product = multiply(total, left, rows, start, stride, columns, stride, RANK, BLOCK_K, PRECISION)
    clean = tl.load(base[:, None] + columns[None, :], (columns < end)[None, :], float("-inf")).to(total.dtype)
    logits = clean + product
    if scale is not None:
        logits = tl.where((columns < end)[None, :], logits * scale[:, None], float("-inf"))
    return clean, product, logits


@triton.jit
def sweep_nll_kernel(
    base,  # [T, V]
    delta,  # [P, T, r]
    basis,  # [G, r, basis_stride]
    tokens,  # [T, K]
    order,  # [P] ablations sorted by group
    group,  # [P]
    scale,  # [P, T] or None
    clean_lse,  # [T] or None
    references,  # [S, P, T] partial
    totals,  # [S, P, T] partial
    changes,  # [S, P, T] partial, or None
    picked,  # [P, T, K]
    pairs,
    positions,
    vocabulary,
    groups,
    choices,
    basis_stride,
    splits,
    tiles_a_split,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of rows over one split of the vocabulary. Blocks that run together differ in their ablations only."""
    T: tl.constexpr = tl.float64 if base.dtype.element_ty == tl.float64 else tl.float32
    pair_blocks = tl.cdiv(pairs, BLOCK_P)
    program = tl.program_id(0)
    split = program // pair_blocks % splits
    first_position = program // pair_blocks // splits * BLOCK_T

    # Rows past the ends repeat the last ablation or position and are not stored.
    row = tl.arange(0, BLOCK_P * BLOCK_T)
    slot = program % pair_blocks * BLOCK_P + row // BLOCK_T
    inside = (slot < pairs) & (first_position + row % BLOCK_T < positions)
    pair = tl.load(order + tl.minimum(slot, pairs - 1))
    t = tl.minimum(first_position + row % BLOCK_T, positions - 1).to(tl.int64)
    out = pair * positions + t
    base_rows = base + t * vocabulary
    rows = delta + out * RANK
    left = load_left(rows, 0, RANK, BLOCK_K)
    if scale is not None:
        scale = tl.load(scale + out).to(T)
    if clean_lse is not None:
        clean = tl.load(clean_lse + t).to(tl.float64)
        clean_high = clean.to(T)
        clean_low = (clean - clean_high.to(tl.float64)).to(T)

    # A group that does not exist must not be read, and gives NaN.
    asked = tl.load(group + pair)
    home = tl.minimum(tl.maximum(asked, 0), groups - 1)
    poison = tl.where(asked == home, 0.0, float("nan")).to(T)
    g = tl.min(home)
    last = tl.max(home)
    while g <= last:
        here = inside & (home == g)
        start = basis + g * RANK * basis_stride
        highest = tl.full([BLOCK_P * BLOCK_T], float("-inf"), T)
        total = tl.zeros([BLOCK_P * BLOCK_T], T)
        moved = tl.zeros([BLOCK_P * BLOCK_T], T)
        for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tl.cdiv(vocabulary, BLOCK_V))):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            zeros = tl.zeros([BLOCK_P * BLOCK_T, BLOCK_V], T)
            before, product, logits = _logits(
                base_rows, scale, zeros, left, rows, start, basis_stride, columns, vocabulary, RANK, BLOCK_K, PRECISION
            )
            tallest = tl.maximum(highest, tl.max(logits, 1))
            reference = _reference(tallest)
            total = tl.where(total == 0, 0.0, total * tl.exp2(_reference(highest) - reference))
            total += tl.sum(tl.exp2(logits * LOG2E - reference[:, None]), 1)
            highest = tallest
            if clean_lse is not None:
                probability = tl.exp2(((before - clean_high[:, None]) - clean_low[:, None]) * LOG2E)
                step = product if scale is None else logits - before
                moved += tl.sum(tl.where(probability > 0, probability * step, 0.0), 1)

        place = split.to(tl.int64) * pairs * positions + out
        tl.store(references + place, _reference(highest) + poison, here)
        tl.store(totals + place, total, here)
        if clean_lse is not None:
            tl.store(changes + place, moved + poison, here)

        # The tokens of this block's positions are one more tile, computed as the others were: equal logits stay equal.
        if split == 0:
            lane = tl.arange(0, BLOCK_T)
            for k in range(choices):
                token = tl.load(tokens + tl.minimum(first_position + lane, positions - 1).to(tl.int64) * choices + k)
                there = (token >= 0) & (token < vocabulary)
                zeros = tl.zeros([BLOCK_P * BLOCK_T, BLOCK_T], T)
                _, _, logits = _logits(
                    base_rows,
                    scale,
                    zeros,
                    left,
                    rows,
                    start,
                    basis_stride,
                    tl.where(there, token, vocabulary),
                    vocabulary,
                    RANK,
                    BLOCK_K,
                    PRECISION,
                )
                own = (lane[None, :] == (row % BLOCK_T)[:, None]) & there[None, :]
                value = tl.sum(tl.where(own, logits, 0.0), 1)
                tl.store(picked + out * choices + k, (value + poison).to(tl.float64), here)
        g = tl.min(tl.where(home > g, home, last + 1))


@torch.library.custom_op("pyfastcircuits::sweep_nll_triton", mutates_args=())
def sweep_nll_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None,  # [P, T]
    clean_lse: Tensor | None,  # [T]
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.sweep_nll by Triton: the same arguments and results, and precision "tf32" as well.

    Raises:
        ValueError: shapes that do not fit, or a precision that the dtype does not have.
    """
    _check(base, delta, basis, tokens, group, scale, clean_lse, precision)
    lse, picked, change = _outputs(base, delta, basis, tokens, group, scale, clean_lse, precision)
    (pairs, positions, rank), vocabulary = delta.shape, base.shape[1]
    if lse.numel() == 0:
        return lse, picked, change
    arch = 90
    if base.is_cuda:
        major, minor = torch.cuda.get_device_capability(base.device)
        arch = 10 * major + minor
    sizes = {"P": pairs, "T": positions, "V": vocabulary, "r": rank, "G": len(basis)}
    kind = arithmetic(str(base.dtype).removeprefix("torch."), precision)
    config = choose("sweep_nll", sizes, kind, arch)
    if kind == "bf16":
        delta, basis = delta.bfloat16(), basis.bfloat16()
    basis = torch.nn.functional.pad(basis, (0, -vocabulary % ALIGNMENT)).contiguous()
    work = torch.promote_types(base.dtype, torch.float32)
    references, totals, changes = base.new_empty(3, config.splits, pairs, positions, dtype=work)
    blocks = config.blocks
    row_blocks = triton.cdiv(pairs, blocks["BLOCK_P"]) * triton.cdiv(positions, blocks["BLOCK_T"])
    with torch.cuda.device_of(base):
        sweep_nll_kernel[(row_blocks * config.splits,)](
            base.contiguous(),
            delta.contiguous(),
            basis,
            tokens.contiguous(),
            group.argsort(stable=True),
            group.contiguous(),
            None if scale is None else scale.contiguous(),
            None if clean_lse is None else clean_lse.contiguous(),
            references,
            totals,
            None if clean_lse is None else changes,
            picked,
            pairs,
            positions,
            vocabulary,
            len(basis),
            tokens.shape[1],
            basis.shape[2],
            config.splits,
            triton.cdiv(triton.cdiv(vocabulary, blocks["BLOCK_V"]), config.splits),
            RANK=rank,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **blocks,
        )
        # By the same rounded log2(e) as in the kernel, so that a row's largest logit comes back as it was.
        log2e = torch.tensor(LOG2E.value, dtype=work).item()
        lse = ((references.double() + totals.double().log2()) / log2e).logsumexp(0)
        if clean_lse is not None:
            change = changes.double().sum(0)
    return lse, picked, change


@sweep_nll_triton.register_fake
def _outputs(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    tokens: Tensor,
    group: Tensor,
    scale: Tensor | None,
    clean_lse: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, positions, _ = delta.shape
    shapes = ((pairs, positions), (pairs, positions, tokens.shape[1]), (0 if clean_lse is None else pairs, positions))
    lse, picked, change = (base.new_empty(shape, dtype=torch.float64) for shape in shapes)
    return lse, picked, change


def _check(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    tokens: Tensor,
    group: Tensor,
    scale: Tensor | None,
    clean_lse: Tensor | None,
    precision: str,
) -> None:
    if base.dtype == torch.float64 and precision != "ieee":
        raise ValueError(f"precision is {precision!r}, but base is float64, which has only 'ieee'")
    if {delta.dtype, basis.dtype} != {base.dtype}:
        raise ValueError(f"base is {base.dtype}, delta {delta.dtype} and basis {basis.dtype}: expected one dtype")
    pairs, _, rank = delta.shape
    positions, vocabulary = base.shape
    expected = {
        "delta": (delta, (pairs, positions, rank)),
        "basis": (basis, (max(len(basis), 1), rank, vocabulary)),
        "tokens": (tokens, (positions, tokens.shape[-1])),
        "group": (group, (pairs,)),
        "scale": (scale, (pairs, positions)),
        "clean_lse": (clean_lse, (positions,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
