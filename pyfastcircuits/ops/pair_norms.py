"""Frobenius norms of the products of all pairs of factors: what composition scores are made of.

Two routes give the same norms. One multiplies each pair out and sums the squares of the product's tiles. The other uses
||A B||^2 = <A.T A, B B.T>: one inner product of two Gram matrices for each pair. It cancels where the norm is far
below what the factors allow, and such norms are multiplied out.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import describe, public
from pyfastcircuits.gradients import pair_norms_gradients, register_pair_norms
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend

shapes.register_outputs("pair_norms", shapes.pair_norms_outputs)
register_pair_norms("pyfastcircuits::pair_norms")

Route = Literal["auto", "products", "gram"]
GRAM_ERROR = 1e-5  # relative, of a norm: what the Gram route may cost


@public
def pair_norms(
    left: Tensor,
    right: Tensor,
    *,
    before: Tensor | None = None,
    precision: Precision = "ieee",
    route: Route = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Frobenius norms of left[i] @ right[j] for all pairs; no product is stored. Differentiable; deterministic.

    Args:
        left: [N, r, d]; float32, float64 or bfloat16, as is right.
        right: [M, d, s].
        before: [M] integers: only pairs with i < before[j] are computed, the others are 0. None computes all.
        precision: "ieee", "tf32x3", "tf32" or "bf16"; see the module. "bf16" rounds factors to 2^-8 relative, which
            leaves norms of generic products right to about 1e-3 relative.
        route: "products" multiplies the factors out; "gram" takes the inner product of left[i].T @ left[i] with
            right[j] @ right[j].T, less work where d + 1 < 2 r s and there are many pairs ("ieee" and the CPU kernels
            only). "auto" takes the cheaper one. Norms that are so much smaller than the factors allow that the Gram
            route could be off by more than 1e-5 relative are multiplied out whichever was chosen.
        backend: see the module.

    Returns:
        [N, M] in left's dtype (fp32 for bfloat16).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, a precision or a route that do not fit.
        RuntimeError: a backend or precision that is not there.

    Source: the composition scores of "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021).
    """
    return factored_pair_norms(left, right, before=before, precision=precision, route=route, backend=backend).norms


class FactoredPairNorms(NamedTuple):
    """Frobenius norms of all products, and of the factors."""

    norms: Tensor  # [N, M]
    left: Tensor  # [N]
    right: Tensor  # [M]


@public
def factored_pair_norms(
    left: Tensor,  # [N, r, d]
    right: Tensor | Sequence[Tensor],  # [M, d, s]
    *,
    left_outer: Tensor | None = None,  # [N, q, r]
    right_outer: Tensor | Sequence[Tensor] | None = None,  # [M, s, p]
    before: Tensor | None = None,  # [M]
    precision: Precision = "ieee",
    route: Route = "auto",
    backend: Backend = "auto",
) -> FactoredPairNorms:
    """The norms that `pair_norms` gives, and those of the factors, which may be given as products themselves.

    The factors are left_outer[i] @ left[i] and right[j] @ right_outer[j]; the Gram route does not store them. Where
    `left` or `right` is shared, as by the query heads of one key/value head, it holds each once: left_outer's N is a
    multiple of left's, and consecutive ones share. Several tensors `right`, with as many `right_outer` or none, stand
    one after the other; the Gram route makes what it needs of `left` once for all of them.
    """
    rights = [right] if isinstance(right, Tensor) else list(right)
    outers = [right_outer] if isinstance(right_outer, Tensor) else list(right_outer or [])
    for name, tensors in (("right", rights), ("right_outer", outers)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] is {describe(tensor)}, expected a tensor")
    _check(left, rights, left_outer, outers, before)
    chosen = resolve_backend(backend, left.device, "pair_norms")
    possible = precision == "ieee" and chosen in ("cpu", "reference")
    if route == "gram" and not possible:
        raise ValueError(f"route='gram' has precision='ieee' and the CPU kernels, not {precision!r} on {chosen!r}")
    if route == "auto" and possible:
        N, M = len(left if left_outer is None else left_outer), sum(map(len, outers or rights))
        pairs = N * M if before is None else int(before.clamp(0, N).sum())
        if _gram_is_cheaper(pairs, N * left.shape[1] + M * rights[0].shape[2], left.shape, rights[0].shape):
            route = "gram"
    tracked = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (left, left_outer, *rights, *outers)
    )
    gram = route == "gram" and chosen == "cpu" and not torch.compiler.is_compiling()
    if not gram or tracked:
        left, left_outer = multiplied(left, left_outer), None
        rights, outers = [_one(rights, outers)], []
    before = None if before is None else before.long()
    if gram and not tracked:
        return _by_grams(left, rights, left_outer, outers, before)
    (both,) = rights
    if gram:
        norms = _by_grams(left, rights, None, [], before).norms
    elif chosen == "reference":
        norms = reference.pair_norms(left, both, before).to(shapes.work_dtype(left))
    else:
        norms = kernel_of("pair_norms", chosen)(left, both, before, precision)
    return FactoredPairNorms(norms, *(torch.linalg.matrix_norm(x.to(norms.dtype)) for x in (left, both)))


def multiplied(factors: Tensor, outer: Tensor | None, which: Tensor | slice = slice(None)) -> Tensor:
    """outer @ factors of some, where as many `outer` in a row as there are for each share one of the factors."""
    if outer is None:
        return factors[which]
    index = torch.arange(len(outer), device=outer.device)[which] // (len(outer) // max(len(factors), 1))
    product: Tensor = outer[which] @ factors[index]
    return product


def _one(rights: list[Tensor], outers: list[Tensor]) -> Tensor:
    """Several rights, multiplied out, as one."""
    products = [multiplied(x.mT, o.mT).mT for x, o in zip(rights, outers, strict=True)] if outers else rights
    return products[0] if len(products) == 1 else torch.cat(products)


def _gram_is_cheaper(pairs: int, rows: int, left: torch.Size, right: torch.Size) -> bool:
    """By floating-point operations. The Gram route moves its tiles about and runs at some 0.7 of the other's rate."""
    depth = left[2]
    return (pairs + rows) * (depth + 1) < 0.7 * pairs * 2 * left[1] * right[2]


def _by_grams(
    left: Tensor, rights: list[Tensor], left_outer: Tensor | None, outers: list[Tensor], before: Tensor | None
) -> FactoredPairNorms:
    """The Gram route, with the norms multiplied out that rounding of the Gram matrices could have spoiled.

    <P, N> is wrong by a few rounding errors of ||P|| ||N||; four bound every case tried, see tests/test_pair_norms.py.
    """
    dtype = shapes.work_dtype(left)
    inner, *moments = torch.ops.pyfastcircuits.pair_grams(left, rights, left_outer, outers, before)
    norms = torch.where(inner > 0, inner, 1).sqrt().where(inner > 0, inner.clamp_min(0)).to(dtype)
    P, N = (m[:, 1].sqrt() for m in moments)
    doubtful = inner * (2 * GRAM_ERROR) < 4 * torch.finfo(dtype).eps * P[:, None] * N
    if before is not None:
        doubtful &= torch.arange(len(inner), device=left.device)[:, None] < before
    if doubtful.any():
        norms = _mended(norms, doubtful, left, rights, left_outer, outers, before)
    return FactoredPairNorms(norms, *(m[:, 0].sqrt().to(dtype) for m in moments))


def _mended(
    norms: Tensor,
    doubtful: Tensor,
    left: Tensor,
    rights: list[Tensor],
    left_outer: Tensor | None,
    outers: list[Tensor],
    before: Tensor | None,
) -> Tensor:
    """The doubtful norms multiplied out; all of them where these are many."""
    if doubtful.float().mean() > 0.25:
        factors = multiplied(left, left_outer), _one(rights, outers)
        whole: Tensor = torch.ops.pyfastcircuits.pair_norms(*factors, before, "ieee")
        return whole
    first = 0
    for i, right in enumerate(rights):
        outer = outers[i].mT if outers else None
        count = len(right if outer is None else outer)
        for j in doubtful[:, first : first + count].any(0).nonzero():
            rows, column = doubtful[:, first + int(j)].nonzero()[:, 0], multiplied(right.mT, outer, j).mT
            mended = torch.ops.pyfastcircuits.pair_norms(multiplied(left, left_outer, rows), column, None, "ieee")
            norms = norms.index_put((rows[:, None], first + j), mended)
        first += count
    return norms


def pair_grams_outputs(
    left: Tensor, right: list[Tensor], left_outer: Tensor | None, right_outer: list[Tensor], before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    N, M = len(left if left_outer is None else left_outer), sum(len(x) for x in right_outer or right)
    inner, *moments = (left.new_empty(shape, dtype=torch.float64) for shape in ((N, M), (N, 2), (M, 2)))
    return inner, moments[0], moments[1]


def triangles_outputs(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    rank, dtype = factors.shape[2], torch.float64 if factors.dtype == torch.float64 else torch.float32
    triangles = factors.new_empty(len(factors), rank, rank, dtype=dtype)
    return triangles, factors.new_empty(len(factors), dtype=torch.bool)


shapes.register_outputs("pair_grams", pair_grams_outputs)
shapes.register_outputs("triangles", triangles_outputs)


def _save_grams(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    left, right, left_outer, right_outer, _ = inputs
    if left_outer is not None or right_outer or len(right) > 1:
        raise RuntimeError("pair_grams is differentiable with one right and without outer factors; multiply them in")
    ctx.save_for_backward(left, right[0], output[0])
    ctx.mark_non_differentiable(*output[1:])


def _pair_grams_backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    left, right, inner = ctx.saved_tensors
    norms = inner.clamp_min(0).sqrt()
    left_gradient, right_gradient = pair_norms_gradients(left, right, norms, 2 * norms * gradient)
    return left_gradient, [right_gradient], None, [], None


torch.library.register_autograd("pyfastcircuits::pair_grams", _pair_grams_backward, setup_context=_save_grams)


def _check(
    left: Tensor, rights: list[Tensor], left_outer: Tensor | None, outers: list[Tensor], before: Tensor | None
) -> None:
    if not rights or len(outers) not in (0, len(rights)):
        raise ValueError(
            f"right has {len(rights)} tensors and right_outer {len(outers)}; expected as many, or no outer"
        )
    for right, outer in zip_longest(rights, outers):
        shapes.check_product(
            left=(left, "N r d"),
            right=(right, "M d s"),
            left_outer=(left_outer, "N' q r"),
            right_outer=(outer, "M' s p"),
        )
        _check_sharing("right", right, outer)
    _check_sharing("left", left, left_outer)
    widths = {x.shape[2] for x in outers or rights}
    if len(widths) > 1:
        raise ValueError(f"the tensors of right end in {sorted(widths)} columns, expected the same")
    if before is not None:
        shapes.check_shapes(left=(left, "N r d"), before=(before, str(sum(map(len, outers or rights))), int))


def _check_sharing(name: str, factors: Tensor, outer: Tensor | None) -> None:
    """Raise unless as many `outer` in a row go with each of the factors."""
    if outer is not None and (len(outer) % len(factors) if len(factors) else len(outer)):
        raise ValueError(f"{name}_outer has shape {list(outer.shape)}, which does not fit {name} {list(factors.shape)}")
