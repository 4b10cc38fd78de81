"""Frobenius norms of all pairs of products."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits import reference
from pyfastcircuits.ops.backend import DTYPES, PRECISIONS, Backend, Precision, resolve_backend

Route = Literal["auto", "products", "gram"]
ROUTES = ("auto", "products", "gram")
GRAM_ERROR = 1e-5  # relative, of a norm: what the Gram route may cost


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
        precision: "ieee", "tf32" or "bf16"; see the module. "bf16" rounds the factors to 2^-8 relative, which leaves
            norms of generic products right to about 1e-3 relative.
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
    _check_pairs(left, right, before)
    if backend == "cuda":
        raise RuntimeError("backend='cuda': pair_norms has no CUDA C++ kernel; use 'triton'")
    chosen = resolve_backend(backend, left.device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if route not in ROUTES:
        raise ValueError(f"route is {route!r}, expected one of {', '.join(ROUTES)}")
    if route == "gram" and (precision != "ieee" or chosen not in ("cpu", "reference")):
        raise ValueError(f"route='gram' has precision='ieee' and the CPU kernels, not {precision!r} on {chosen!r}")
    before = None if before is None else before.long()
    if chosen == "reference":
        norms = reference.pair_norms(left, right, before)
        return norms.to(torch.float32 if left.dtype == torch.bfloat16 else left.dtype)
    if chosen == "triton":
        from pyfastcircuits.kernels.pair_norms import pair_norms_triton

        return pair_norms_triton(left, right, before, precision)  # type: ignore[no-any-return]
    kernel = torch.ops.pyfastcircuits.pair_norms
    gram = chosen == "cpu" and precision == "ieee" and not torch.compiler.is_compiling()
    if not gram or route == "products" or (route == "auto" and not _gram_is_cheaper(left, right, before)):
        return kernel(left, right, before, precision, False)  # type: ignore[no-any-return]
    norms = kernel(left, right, before, precision, True)
    return _mended(norms, left, right, before)


def _gram_is_cheaper(left: Tensor, right: Tensor, before: Tensor | None) -> bool:
    """By floating-point operations. The Gram route moves its tiles about and runs at some 0.7 of the other's rate."""
    (lefts, rank, depth), (rights, _, width) = left.shape, right.shape
    pairs = lefts * rights if before is None else int(before.clamp(0, lefts).sum())
    return (pairs + lefts * rank + rights * width) * (depth + 1) < 0.7 * pairs * 2 * rank * width


def _mended(norms: Tensor, left: Tensor, right: Tensor, before: Tensor | None) -> Tensor:
    """Norms of the Gram route, with those multiplied out that rounding of the Gram matrices could have spoiled.

    <P, N> is wrong by a few rounding errors of ||P|| ||N||; four bound every case tried, see tests/test_pair_norms.py.
    """
    wide = torch.float32 if left.dtype == torch.bfloat16 else left.dtype
    P = torch.linalg.matrix_norm(left.detach().to(wide) @ left.detach().to(wide).mT)
    N = torch.linalg.matrix_norm(right.detach().to(wide).mT @ right.detach().to(wide))
    doubtful = norms.detach().square() * (2 * GRAM_ERROR) < 4 * torch.finfo(wide).eps * P[:, None] * N
    if before is not None:
        doubtful &= torch.arange(len(left), device=left.device)[:, None] < before
    if not doubtful.any():
        return norms
    kernel = torch.ops.pyfastcircuits.pair_norms
    if doubtful.float().mean() > 0.25:
        return kernel(left, right, before, "ieee", False)  # type: ignore[no-any-return]
    norms = norms.clone()
    for j in doubtful.any(0).nonzero()[:, 0].tolist():
        rows = doubtful[:, j].nonzero()[:, 0]
        norms[rows, j] = kernel(left[rows], right[j : j + 1], None, "ieee", False)[:, 0]
    return norms


@torch.library.register_fake("pyfastcircuits::pair_norms")  # type: ignore[untyped-decorator]
def pair_norms_fake(left: Tensor, right: Tensor, before: Tensor | None, precision: str, gram: bool) -> Tensor:
    """Shape alone, for torch.compile."""
    dtype = torch.float32 if left.dtype == torch.bfloat16 else left.dtype
    return left.new_empty(len(left), len(right), dtype=dtype)


@torch.library.register_fake("pyfastcircuits::triangles")  # type: ignore[untyped-decorator]
def triangles_fake(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    rank = factors.shape[2]
    triangles = factors.new_empty(len(factors), rank, rank, dtype=torch.float64)
    return triangles, factors.new_empty(len(factors), dtype=torch.bool)


def _save_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)


def _pair_norms_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    left, right, norms = ctx.saved_tensors
    return *reference.pair_norms_gradients(left, right, norms, gradient), None, None, None


torch.library.register_autograd("pyfastcircuits::pair_norms", _pair_norms_backward, setup_context=_save_pairs)


def _check_pairs(left: Tensor, right: Tensor, before: Tensor | None) -> None:
    for name, tensor, shape in (("left", left, "[N, r, d]"), ("right", right, "[M, d, s]")):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shape}")
    if left.shape[2] != right.shape[1]:
        raise ValueError(f"left has shape {list(left.shape)} and right {list(right.shape)}: their d differ")
    if left.dtype not in DTYPES:
        raise TypeError(f"left has dtype {left.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if right.dtype != left.dtype:
        raise TypeError(f"right has dtype {right.dtype}, but left has {left.dtype}")
    if right.device != left.device:
        raise ValueError(f"right is on {right.device}, but left is on {left.device}")
    if before is None:
        return
    if before.shape != right.shape[:1]:
        raise ValueError(f"before has shape {list(before.shape)}, expected {[len(right)]}")
    if before.is_floating_point() or before.dtype == torch.bool:
        raise TypeError(f"before has dtype {before.dtype}, expected integers")
    if before.device != left.device:
        raise ValueError(f"before is on {before.device}, but left is on {left.device}")
