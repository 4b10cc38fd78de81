"""factored_topk on the tile core: the epilogue keeps the best entry of every segment of a row.

The k best segments hold the k best entries.

A segment is a run of consecutive columns of one row. Order segments by their best entry, equal ones by row, then
column: an entry outside the k best segments has k entries before it, the best of each, so it is none of the k best,
ties included. A second pass multiplies again and stores the entries of those k segments alone, k * segment of them;
an exact selection ends it. Both passes multiply the same tiles by the same instructions: their entries are equal to
the bit. Per row the same holds with segments of the row; they are shorter, so that there are many more than k.

A screen is one pass more, before these, in bfloat16: it bounds the best entry of every segment from below and above.
No tile is multiplied in full whose bounds from above all lie below the k-th best bound from below.

A whole matrix costs one product of A and B in full, or with a screen that share of it which holds the k best; the best
of each row cost two, since every tile holds some of a row's best. The host reads nothing back. Memory is SCRATCH
entries at a time. An entry that overflows to NaN counts as -inf (+inf where the smallest are wanted).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.kernels.common import architecture, configure, laid_out
from pyfastcircuits.kernels.configs import Config, choose
from pyfastcircuits.kernels.tile import multiply, rows_of_product, tiles_of

NARROWEST, WIDEST = 8, 128  # columns of a segment: at most those of a tile, at least what registers hold well
SCRATCH = 1 << 25  # segments, or entries of the k best ones, of the rows that are taken together
HUGE = tl.constexpr(3e38)  # bounds of products that might go beyond are infinite
FLOOR = 2.0**-60  # of a norm: covers what bfloat16 and float32 lose below their smallest normal numbers


@triton.jit
def _entries(
    left,  # [M, BLOCK_K]
    pointers,  # [M]
    B,  # [DEPTH, stride]
    stride,
    shift,  # [M] or None
    tile,
    columns,
    DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The entries [M, N] of a tile; -inf for NaN and past the last column."""
    here = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    product = multiply(left, pointers, B, stride, here, stride, DEPTH, "ieee")
    if shift is not None:
        product -= shift[:, None]
    return tl.where((here < columns)[None, :] & (product == product), product, float("-inf"))


@triton.jit
def _best(entries, SEGMENT: tl.constexpr):
    """The best entry of every segment of a tile, [M, N / SEGMENT]."""
    return tl.max(tl.reshape(entries, [entries.shape[0], entries.shape[1] // SEGMENT, SEGMENT]), 2)


@triton.jit
def factored_topk_screen_kernel(
    A,  # [N, DEPTH] bfloat16
    B,  # [DEPTH, stride] bfloat16
    shift,  # [N] or None
    row_norm,  # [N]
    column_norm,  # [S], the largest of each segment
    lower,  # [N, S]
    upper,  # [N, S]
    rows,
    columns,
    stride,
    segments,
    splits,
    tiles_a_split,
    DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Bounds of the best entry of every segment, from products of rounded factors.

    |sum a b - sum a' b'| <= (2^-8 + 2^-18) |a| |b| for factors rounded by at most 2^-9 relative (Cauchy-Schwarz);
    2^-20 for each of the DEPTH additions is several times what float32 chains and tensor cores lose together.
    """
    SLACK: tl.constexpr = 0.00394 + DEPTH * 9.5367431640625e-07
    ROUNDING: tl.constexpr = 4.76837158203125e-07  # 2^-21: of taking the shift and of adding bounds
    row, inside, pointers, left = rows_of_product(A, rows, splits, DEPTH, BLOCK_M, BLOCK_K)
    first, end = tiles_of(tl.program_id(0) % splits, tiles_a_split, columns, BLOCK_N)
    size = tl.load(row_norm + row)
    offset = tl.zeros([BLOCK_M], tl.float32)
    if shift is not None:
        shift = tl.load(shift + row)
        offset = tl.abs(shift)
    for tile in range(first, end):
        entries = _entries(left, pointers, B, stride, shift, tile, columns, DEPTH, BLOCK_N)
        best = _best(entries, SEGMENT)
        segment = tile * (BLOCK_N // SEGMENT) + tl.arange(0, BLOCK_N // SEGMENT)
        there = segment < segments
        product = size[:, None] * tl.load(column_norm + segment, there, 0.0)[None, :]
        largest = product + offset[:, None]
        bound = tl.where(largest < HUGE, SLACK * product + ROUNDING * largest, float("inf"))
        place = row[:, None] * segments + segment[None, :]
        here = inside[:, None] & there[None, :]
        # Where the bound is infinite, the best entry may be too, on either side.
        tl.store(lower + place, tl.where(largest < HUGE, best - bound, float("-inf")), here)
        tl.store(upper + place, tl.where(largest < HUGE, best + bound, float("inf")), here)


@triton.jit
def factored_topk_segments_kernel(
    A,  # [N, DEPTH]
    B,  # [DEPTH, stride]
    shift,  # [N] or None
    upper,  # [N, S] or None
    floor,  # [N], or [1] for all rows; with upper
    best,  # [N, S]
    rows,
    columns,
    stride,
    segments,
    splits,
    tiles_a_split,
    DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The best entry of every segment; -inf in tiles none of whose bounds `upper` reaches the floor."""
    T: tl.constexpr = best.dtype.element_ty
    row, inside, pointers, left = rows_of_product(A, rows, splits, DEPTH, BLOCK_M, BLOCK_K)
    first, end = tiles_of(tl.program_id(0) % splits, tiles_a_split, columns, BLOCK_N)
    if shift is not None:
        shift = tl.load(shift + row)
    if upper is not None:
        bar = tl.load(floor + row * PER_ROW)
    for tile in range(first, end):
        segment = tile * (BLOCK_N // SEGMENT) + tl.arange(0, BLOCK_N // SEGMENT)
        place = row[:, None] * segments + segment[None, :]
        here = inside[:, None] & (segment < segments)[None, :]
        if upper is None:
            entries = _entries(left, pointers, B, stride, shift, tile, columns, DEPTH, BLOCK_N)
            tl.store(best + place, _best(entries, SEGMENT), here)
        else:
            found = tl.full([BLOCK_M, BLOCK_N // SEGMENT], float("-inf"), T)
            if tl.max((here & (tl.load(upper + place, here, 0.0) >= bar[:, None])).to(tl.int32)) > 0:
                entries = _entries(left, pointers, B, stride, shift, tile, columns, DEPTH, BLOCK_N)
                found = _best(entries, SEGMENT)
            tl.store(best + place, found, here)


@triton.jit
def factored_topk_entries_kernel(
    A,  # [N, DEPTH]
    B,  # [DEPTH, stride]
    shift,  # [N] or None
    slots,  # [N, S], -1 for segments that are not wanted
    found,  # [slots, SEGMENT]
    rows,
    columns,
    stride,
    segments,
    splits,
    tiles_a_split,
    DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All entries of the wanted segments, each segment in its slot."""
    row, inside, pointers, left = rows_of_product(A, rows, splits, DEPTH, BLOCK_M, BLOCK_K)
    first, end = tiles_of(tl.program_id(0) % splits, tiles_a_split, columns, BLOCK_N)
    if shift is not None:
        shift = tl.load(shift + row)
    column = tl.arange(0, BLOCK_N)
    for tile in range(first, end):
        segment = tile * (BLOCK_N // SEGMENT) + tl.arange(0, BLOCK_N // SEGMENT)
        place = slots + row[:, None] * segments
        here = inside[:, None] & (segment < segments)[None, :]
        if tl.max(tl.load(place + segment[None, :], here, -1)) >= 0:
            entries = _entries(left, pointers, B, stride, shift, tile, columns, DEPTH, BLOCK_N)
            home = tile * (BLOCK_N // SEGMENT) + column // SEGMENT
            slot = tl.load(place + home[None, :], inside[:, None] & (home < segments)[None, :], -1)
            tl.store(found + slot.to(tl.int64) * SEGMENT + (column % SEGMENT)[None, :], entries, slot >= 0)


@torch.library.custom_op("pyfastcircuits::factored_topk_triton", mutates_args=())
def factored_topk_triton(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    k: int,
    largest: bool,
    per_row: bool,
    shift: Tensor | None,  # [N]
    screen: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.factored_topk by Triton: the same arguments and results.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a screen that the dtype does not have.
        RuntimeError: a screen that the GPU does not have.
    """
    sizes = shapes.check_product(A=(A, "N r"), B=(B, "r M"))
    shapes.check_shapes(A=(A, "N r"), shift=(shift, "N", float))
    shapes.check_choice("screen", screen, shapes.SCREENS)
    rows, columns = len(A), B.shape[1]
    most = min(shapes.MOST_PER_ROW["triton"], columns) if per_row else min(shapes.MOST["triton"], rows * columns)
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, expected 1 to {most}")
    segment = segment_width(columns if per_row else rows * columns, k)
    segments = triton.cdiv(columns, segment)
    step = max(1, SCRATCH // (max(segments, min(k, segments) * segment) if per_row else segments))
    sizes["N"] = min(rows, step)
    config, kind = configure("factored_topk", sizes, A)
    arch = architecture(A)
    screening = choose("factored_topk", sizes, "bf16", arch) if _screened(screen, A.dtype, per_row, arch) else None
    A, B = A.contiguous(), laid_out(B, kind)
    shift = None if shift is None else shift.to(shapes.work_dtype(A)).contiguous()
    if not largest:  # negation is exact, in every sum as in its terms
        A, shift = -A, None if shift is None else -shift
    found: list[tuple[Tensor, Tensor]] = []
    with torch.cuda.device_of(A):
        for first in range(0, rows, step):
            here = slice(first, first + step)
            offset = None if shift is None else shift[here]
            values, places = _part(A[here], B, offset, columns, k, per_row, segment, config, screening)
            if found and not per_row:  # those of earlier rows come first, so equal ones stay in order
                before, earlier = found.pop()
                values = torch.cat((before, values), 1)
                places = torch.cat((earlier, places + first * columns), 1)
                values, order = values.sort(descending=True, stable=True)
                values, places = values[:, :k], places.gather(1, order)[:, :k]
            found.append((values, places))
    values, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = values if largest else 0.0 - values  # no -0.0
    if per_row:
        return values, torch.arange(rows, device=A.device)[:, None].repeat(1, k), places
    return values[0], places[0] // columns, places[0] % columns


def segment_width(entries: int, k: int) -> int:
    """Columns of a segment where k >= 1 of `entries` >= k are wanted: as many segments as the k best have entries."""
    return min(max(1 << (math.isqrt(entries // k).bit_length() - 1), NARROWEST), WIDEST)


def _part(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, stride]
    shift: Tensor | None,  # [N]
    columns: int,
    k: int,
    per_row: bool,
    segment: int,
    config: Config,
    screening: Config | None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of these rows, largest first, and their places in the row or in all rows: [N or 1, k]."""
    rows, segments = len(A), triton.cdiv(columns, segment)
    groups = rows if per_row else 1

    def launch(kernel: triton.JITFunction, config: Config, A: Tensor, B: Tensor, *rest: object, **more: object) -> None:
        grid = (config.count(rows, "BLOCK_M") * config.splits,)
        sizes = (rows, columns, B.shape[1], segments, config.splits, config.tiles(columns, "BLOCK_N"))
        kernel[grid](A, B, shift, *rest, *sizes, DEPTH=A.shape[1], SEGMENT=segment, **more, **config.options)

    work = shapes.work_dtype(A)
    if k < rows * segments // groups:
        upper, floor = None, None
        if screening is not None:
            lower, upper = A.new_empty(2, rows, segments)
            norms = torch.linalg.vector_norm(B, dim=0, dtype=torch.float64)[:columns]
            norms = torch.nn.functional.pad(norms, (0, segments * segment - columns)).view(segments, segment)
            sizes = _bound(torch.linalg.vector_norm(A, dim=1, dtype=torch.float64)), _bound(norms.amax(1))
            launch(factored_topk_screen_kernel, screening, A.bfloat16(), B.bfloat16(), *sizes, lower, upper)
            if not per_row:  # the best of each row are enough for a bound
                lower = (lower.amax(1) if rows >= k else lower).view(1, -1)
            floor = lower.topk(k, sorted=False).values.amin(1)
            del lower
        best = A.new_empty(rows, segments, dtype=work)
        launch(factored_topk_segments_kernel, config, A, B, upper, floor, best, PER_ROW=per_row)
        wanted = _first(best.view(groups, -1), k) if per_row or rows <= k else _of_best_rows(best, k)
        del best, upper
    else:
        wanted = torch.arange(rows * segments // groups, device=A.device).expand(groups, -1)
    slots = torch.full((rows, segments), -1, dtype=torch.int32, device=A.device)
    flat = wanted + torch.arange(groups, device=A.device)[:, None] * segments
    slots.view(-1)[flat.reshape(-1)] = torch.arange(flat.numel(), dtype=torch.int32, device=A.device)
    entries = A.new_empty(*wanted.shape, segment, dtype=work)
    launch(factored_topk_entries_kernel, config, A, B, slots, entries)

    # Slots stand in the order of their segments, so the flattened entries in that of their places.
    column = torch.arange(segment, device=A.device)
    exists = column < (columns - wanted % segments * segment)[..., None]
    most = min(k, columns if per_row else rows * columns)
    chosen = _first(entries.view(groups, -1), most, exists.view(groups, -1))
    home = wanted.gather(1, chosen // segment)
    values, order = entries.view(groups, -1).gather(1, chosen).sort(descending=True, stable=True)
    places = home // segments * columns + home % segments * segment + chosen % segment
    return values, places.gather(1, order)


def _first(x: Tensor, k: int, exists: Tensor | None = None) -> Tensor:
    """Places of the k largest of every row of x [G, n], ascending; of equal ones the first. All n where k >= n."""
    groups, n = x.shape
    if k >= n:
        return torch.arange(n, device=x.device).expand(groups, n)
    last = x.topk(k, sorted=False).values.amin(1, keepdim=True)
    above, level = x > last, x == last
    if exists is not None:  # what does not is -inf
        level &= exists
    room = k - above.sum(1, keepdim=True)
    kept = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))
    return kept.nonzero_static(size=groups * k)[:, 1].view(groups, k)


def _of_best_rows(best: Tensor, k: int) -> Tensor:
    """`_first` of all segments [N, S] as one row [1, k]: only the k rows with the best segments are searched."""
    rows = _first(best.amax(1)[None], k)[0]
    chosen = _first(best[rows].view(1, -1), k)
    segments = best.shape[1]
    return rows[chosen // segments] * segments + chosen % segments


def _bound(norms: Tensor) -> Tensor:
    """Norms for the screen's bounds: infinite where factors rounded to bfloat16 could be."""
    return torch.where(norms < HUGE.value, norms + FLOOR, torch.inf).float()


def _screened(screen: str, dtype: torch.dtype, per_row: bool, arch: int) -> bool:
    """Whether to screen.

    Raises:
        ValueError: a dtype without a screen.
        RuntimeError: a GPU without bfloat16 products.
    """
    if screen == "auto":
        return dtype == torch.float32 and not per_row and arch >= 80
    if screen == "bf16" and dtype != torch.float32:
        raise ValueError(f"screen is 'bf16', but A is {dtype}: only float32 factors are screened")
    if screen == "bf16" and arch < 80:
        raise RuntimeError(f"screen is 'bf16', but compute capability {arch / 10} has no bfloat16 products")
    return screen == "bf16"


shapes.register_outputs("factored_topk_triton", shapes.factored_topk_outputs)
