"""sweep_nll on the tile core: the epilogue keeps a running maximum and sum of exponentials of every row.

A block's rows are BLOCK_P ablations x BLOCK_T positions: ablations at the same position share a row of clean logits,
those of one group a tile of the basis. Each split of the vocabulary leaves partial results, joined in order. The
expected change needs no pass over the logits: it is linear in the basis, whose clean mean serves all of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.configs import arithmetic, choose
from pyfastcircuits.kernels.tile import load_left, multiply

__all__ = ["sweep_nll_triton"]

LOG2E = tl.constexpr(1.4426950408889634)
MEAN_ELEMENTS = 1 << 22  # of a slice's fp64 copies
TOKENS_OPTIONS = {"num_stages": 1, "maxnreg": 255}  # left to itself, ptxas would rather spill than have few warps
ALIGNMENT = 16  # elements between rows of the basis, so that loads are wide and can run ahead


@triton.jit
def _reference(highest):
    """Exponentials are powers of 2 relative to this; an infinite maximum leaves them as they are: sums of 0 or inf."""
    return tl.where(tl.abs(highest) < float("inf"), highest * LOG2E, 0.0)


@triton.jit
def _rows(order, group, pairs, positions, groups, block, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """Ablation, position, group and whether to store, of every row of a block; all [M].

    Rows past the ends repeat the last ablation or position. A group that does not exist is not to be read: NaN is
    stored instead.
    """
    row = tl.arange(0, BLOCK_P * BLOCK_T)
    pair_blocks = tl.cdiv(pairs, BLOCK_P)
    slot = block % pair_blocks * BLOCK_P + row // BLOCK_T
    t = block // pair_blocks * BLOCK_T + row % BLOCK_T
    pair = tl.load(order + tl.minimum(slot, pairs - 1))
    asked = tl.load(group + pair)
    home = tl.minimum(tl.maximum(asked, 0), groups - 1)
    poison = tl.where(asked == home, 0.0, float("nan"))
    return pair, tl.minimum(t, positions - 1).to(tl.int64), home, poison, (slot < pairs) & (t < positions)


@triton.jit
def _capped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP); near zero, where 1 - 2 / (e^2x + 1) cancels, by Cephes' polynomial or rational."""
    x = x / CAP
    z = x * x
    if x.dtype == tl.float64:
        p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        near = x * (z * p / q) + x
    else:
        p = ((z * -5.70498872745e-3 + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        near = (p * z - 3.33332819422e-1) * z * x + x
    far = 1 - 2 / (tl.exp2(tl.minimum(tl.abs(x), 40.0) * (2 * LOG2E)) + 1)
    out = tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
    return CAP * tl.where(x == x, out, x)


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
    CAP: tl.constexpr,
):
    """The ablated logits [M, N]; -inf in columns from `end` on."""
    # Added to the base afterwards: a sum that starts from a large logit would round at every step.
    product = multiply(total, left, rows, start, stride, columns, stride, RANK, BLOCK_K, PRECISION)
    logits = product + tl.load(base[:, None] + columns[None, :], (columns < end)[None, :], float("-inf"))
    if scale is not None:
        logits = tl.where((columns < end)[None, :], logits * scale[:, None], float("-inf"))
    if CAP is not None:
        logits = tl.where((columns < end)[None, :], _capped(logits, CAP), float("-inf"))
    return logits


@triton.jit
def sweep_nll_kernel(
    base,  # [T, V]
    delta,  # [P, T, r]
    basis,  # [G, r, basis_stride]
    order,  # [P] ablations sorted by group
    group,  # [P]
    scale,  # [P, T] or None
    references,  # [S, P, T] partial
    totals,  # [S, P, T] partial
    pairs,
    positions,
    vocabulary,
    groups,
    basis_stride,
    splits,
    tiles_a_split,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Sums of exponentials of one block of rows over one split of the vocabulary."""
    T: tl.constexpr = tl.float64 if base.dtype.element_ty == tl.float64 else tl.float32
    # Blocks that run together differ in their ablations first: they read the same clean logits from the L2 cache.
    pair_blocks = tl.cdiv(pairs, BLOCK_P)
    split = tl.program_id(0) // pair_blocks % splits
    block = tl.program_id(0) // pair_blocks // splits * pair_blocks + tl.program_id(0) % pair_blocks
    pair, t, home, poison, inside = _rows(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    out = pair * positions + t
    rows = delta + out * RANK
    left = load_left(rows, 0, RANK, BLOCK_K)
    if scale is not None:
        scale = tl.load(scale + out).to(T)
    g = tl.min(home)
    last = tl.max(home)
    while g <= last:
        start = basis + g * RANK * basis_stride
        highest = tl.full([BLOCK_P * BLOCK_T], float("-inf"), T)
        total = tl.zeros([BLOCK_P * BLOCK_T], T)
        for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tl.cdiv(vocabulary, BLOCK_V))):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            zeros = tl.zeros([BLOCK_P * BLOCK_T, BLOCK_V], T)
            logits = _logits(
                base + t * vocabulary,
                scale,
                zeros,
                left,
                rows,
                start,
                basis_stride,
                columns,
                vocabulary,
                RANK,
                BLOCK_K,
                PRECISION,
                CAP,
            )
            tallest = tl.maximum(highest, tl.max(logits, 1))
            reference = _reference(tallest)
            total = tl.where(total == 0, 0.0, total * tl.exp2(_reference(highest) - reference))
            total += tl.sum(tl.exp2(logits * LOG2E - reference[:, None]), 1)
            highest = tallest
        here = inside & (home == g)
        place = split.to(tl.int64) * pairs * positions + out
        tl.store(references + place, _reference(highest) + poison.to(T), here)
        tl.store(totals + place, total, here)
        g = tl.min(tl.where(home > g, home, last + 1))


@triton.jit
def sweep_nll_tokens_kernel(
    base,  # [T, V]
    delta,  # [P, T, r]
    basis,  # [G, r, basis_stride]
    tokens,  # [T, K]
    order,  # [P] ablations sorted by group
    group,  # [P]
    scale,  # [P, T] or None
    mean_base,  # [T] or None
    mean_basis,  # [G, T, r] or None
    picked,  # [P, T, K]
    change,  # [P, T] or empty
    pairs,
    positions,
    vocabulary,
    groups,
    choices,
    basis_stride,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Logits of the tokens, and the expected change, of one block of rows.

    The tokens of its positions are a tile like those of the sweep, multiplied in the same order: equal logits stay
    equal. Apart from the sweep, whose registers this would fill.
    """
    T: tl.constexpr = tl.float64 if base.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0)
    pair, t, home, poison, inside = _rows(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    out = pair * positions + t
    rows = delta + out * RANK
    left = load_left(rows, 0, RANK, BLOCK_K)
    if scale is not None:
        scale = tl.load(scale + out).to(T)

    lane = tl.arange(0, BLOCK_T)
    own = lane[None, :] == (tl.arange(0, BLOCK_P * BLOCK_T) % BLOCK_T)[:, None]
    place = tl.minimum(block // tl.cdiv(pairs, BLOCK_P) * BLOCK_T + lane, positions - 1).to(tl.int64)
    g = tl.min(home)
    last = tl.max(home)
    while g <= last:
        here = inside & (home == g)
        for k in range(choices):
            token = tl.load(tokens + place * choices + k)
            there = (token >= 0) & (token < vocabulary)
            zeros = tl.zeros([BLOCK_P * BLOCK_T, BLOCK_T], T)
            logits = _logits(
                base + t * vocabulary,
                scale,
                zeros,
                left,
                rows,
                basis + g * RANK * basis_stride,
                basis_stride,
                tl.where(there, token, vocabulary),
                vocabulary,
                RANK,
                BLOCK_K,
                PRECISION,
                CAP,
            )
            value = tl.sum(tl.where(own & there[None, :], logits, 0.0), 1)
            tl.store(picked + out * choices + k, value.to(tl.float64) + poison, here)
        g = tl.min(tl.where(home > g, home, last + 1))

    if mean_basis is not None:
        moved = tl.zeros([BLOCK_P * BLOCK_T], T)
        for first in range(0, RANK, 16):
            step = load_left(rows, first, RANK, 16).to(T)
            moved += tl.sum(step * load_left(mean_basis + (home * positions + t) * RANK, first, RANK, 16), 1)
        if scale is not None:
            moved = scale * moved + (scale - 1) * tl.load(mean_base + t)
        tl.store(change + out, moved.to(tl.float64) + poison, inside)


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
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.sweep_nll by Triton: the same arguments and results, and precision "tf32" as well.

    Raises:
        ValueError: shapes that do not fit, or a precision that the dtype does not have.
        RuntimeError: clean_lse with a cap: the expected change is then not linear in the basis.
    """
    _check(base, delta, basis, tokens, group, scale, clean_lse, precision)
    if cap is not None and clean_lse is not None:
        raise RuntimeError(
            f"the triton backend has no divergence of capped logits (cap is {cap}): take backend='cuda', or no kl"
        )
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
    references, totals = base.new_empty(2, config.splits, pairs, positions, dtype=work)
    mean_base, mean_basis = (None, None) if clean_lse is None else _clean_means(base, basis, clean_lse, work)
    rows = {name: config.blocks[name] for name in ("BLOCK_P", "BLOCK_T", "BLOCK_K")}
    row_blocks = triton.cdiv(pairs, rows["BLOCK_P"]) * triton.cdiv(positions, rows["BLOCK_T"])
    base, delta, group = base.contiguous(), delta.contiguous(), group.contiguous()
    order = group.argsort(stable=True)
    scale = None if scale is None else scale.contiguous()
    with torch.cuda.device_of(base):
        sweep_nll_kernel[(row_blocks * config.splits,)](
            base,
            delta,
            basis,
            order,
            group,
            scale,
            references,
            totals,
            pairs,
            positions,
            vocabulary,
            len(basis),
            basis.shape[2],
            config.splits,
            triton.cdiv(triton.cdiv(vocabulary, config.blocks["BLOCK_V"]), config.splits),
            RANK=rank,
            PRECISION=precision,
            CAP=cap,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **config.blocks,
        )
        sweep_nll_tokens_kernel[(row_blocks,)](
            base,
            delta,
            basis,
            tokens.contiguous(),
            order,
            group,
            scale,
            mean_base,
            mean_basis,
            picked,
            change,
            pairs,
            positions,
            vocabulary,
            len(basis),
            tokens.shape[1],
            basis.shape[2],
            RANK=rank,
            PRECISION=precision,
            CAP=cap,
            num_warps=config.num_warps,
            **TOKENS_OPTIONS,
            **rows,
        )
        # By the same rounded log2(e) as in the kernel, so that a row's largest logit comes back as it was.
        log2e = torch.tensor(LOG2E.value, dtype=work, device="cpu").item()
        lse = ((references.double() + totals.double().log2()) / log2e).logsumexp(0)
    return lse, picked, change


def _clean_means(base: Tensor, basis: Tensor, clean_lse: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of base [T] and of every row of the basis [G, T, r] under the clean run's probabilities.

    In fp64, so that no setting of torch's matrix products matters; by slices of the vocabulary, for memory.
    """
    (groups, rank, _), (positions, vocabulary) = basis.shape, base.shape
    mean_base = base.new_zeros(positions, dtype=torch.float64)
    mean_basis = base.new_zeros(positions, groups * rank, dtype=torch.float64)
    width = max(1, MEAN_ELEMENTS // (groups * rank + positions))
    for first in range(0, vocabulary, width):
        here = slice(first, min(first + width, vocabulary))
        logits = base[:, here].double()
        probability = (logits - clean_lse.double()[:, None]).exp()
        seen = probability > 0
        probability = torch.where(seen, probability, 0.0)
        mean_base += torch.where(seen, probability * logits, 0.0).sum(-1)
        mean_basis += probability @ basis[..., here].reshape(groups * rank, -1).double().T
    return mean_base.to(work), mean_basis.view(positions, groups, rank).transpose(0, 1).to(work).contiguous()


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
    cap: float | None = None,
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
