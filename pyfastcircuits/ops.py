"""The ops beneath: thin, typed, usable on their own.

`backend` is "auto" (the CPU kernels for CPU tensors, Triton for CUDA tensors), "cpu", "triton", "cuda" or "reference".
A backend that is not there raises; nothing falls back. `precision` is "ieee" (the inputs' own arithmetic; bfloat16
inputs accumulate in fp32), "tf32" (Triton) or "bf16" (factors rounded to bfloat16, fp32 accumulation).
"""

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyfastcircuits import _library, reference

__all__ = ["Backend", "Precision", "Route", "pair_norms", "sweep_nll", "sweep_statistics"]

Backend = Literal["auto", "cpu", "triton", "cuda", "reference"]
Precision = Literal["ieee", "tf32", "bf16"]
Route = Literal["auto", "products", "gram"]
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
PRECISIONS = ("ieee", "tf32", "bf16")
ROUTES = ("auto", "products", "gram")
GRAM_ERROR = 1e-5  # relative, of a norm: what the Gram route may cost
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs tensors of `device`, or an error that says what is missing.

    Raises:
        ValueError: an unknown backend, or one that does not run on this device.
        RuntimeError: a backend that this build or machine lacks.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "cpu"
    if backend == "triton" and not _library.has_triton():
        raise RuntimeError("backend='triton' needs the triton package, which is not installed")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    wanted = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device.type)
    if wanted == "cuda" and not interpreted:
        if not torch.cuda.is_available():
            raise RuntimeError(f"backend={backend!r} needs a CUDA device, and torch sees none")
        if backend == "cuda" and not _library._CUDA_LIBRARY.exists():
            raise RuntimeError("backend='cuda': this build has no CUDA kernels; rebuild where nvcc is found")
    if device.type != wanted and not interpreted:
        raise ValueError(f"backend={backend!r} runs on {wanted} tensors, but they are on {device}")
    return backend


def sweep_statistics(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None = None,  # [P, T]
    clean_lse: Tensor | None = None,  # [T]
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What a slice of the vocabulary adds to a sweep: the raw op, whose results of several slices can be merged.

    Logits are `scale[p, t] * (base[t] + delta[p, t] @ basis[group[p]])`. Returns, in fp64, their logsumexp [P, T]; the
    logits of `tokens` [P, T, K], 0 for a token outside the slice; and, with `clean_lse` (logsumexp of the clean logits
    over the whole vocabulary), E[logits - base] under the clean run's probabilities [P, T], else [0, T].
    """
    chosen = resolve_backend(backend, base.device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if chosen == "reference":
        return reference.sweep_nll(base, delta, basis, tokens, group, scale, clean_lse)
    if chosen == "triton":
        from pyfastcircuits.kernels.sweep_nll import sweep_nll_triton as kernel
    else:
        kernel = torch.ops.pyfastcircuits.sweep_nll
    lse, picked, change = kernel(base, delta, basis, tokens, group, scale, clean_lse, precision)
    return lse, picked, change


@torch.library.register_fake("pyfastcircuits::sweep_nll")  # type: ignore[untyped-decorator]
def sweep_nll_fake(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    tokens: Tensor,
    group: Tensor,
    scale: Tensor | None,
    clean_lse: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    pairs, positions, _ = delta.shape
    shapes = ((pairs, positions), (pairs, positions, tokens.shape[1]), (0 if clean_lse is None else pairs, positions))
    lse, picked, change = (base.new_empty(shape, dtype=torch.float64) for shape in shapes)
    return lse, picked, change


@overload
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    kl: Literal[False] = False,
    logit_difference: None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    kl: bool = False,
    logit_difference: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]: ...
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    kl: bool = False,
    logit_difference: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Next-token losses of P ablations that each change the clean logits by a low-rank term; no logit is stored.

    The logits of ablation p at position t are `base[t] + delta[p, t] @ basis[group[p]]` (an ablation passes minus what
    its path writes), times `scale[p, t]` if given (a recomputed final norm). Deterministic: results do not depend on
    threads or on how the work is cut. Not differentiable.

    Args:
        base: [T, V] clean logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [P, T, r], r >= 0.
        basis: [G, r, V].
        targets: [T] integer tokens.
        group: [P] integers below G, which basis each ablation writes through; None where G is 1.
        scale: [P, T], positive.
        kl: also return KL(clean || ablated) [P, T] in nats.
        logit_difference: two [T] tensors of tokens; also return logit(first) - logit(second) [P, T].
        precision: "ieee", "tf32" or "bf16"; see the module. "bf16" rounds each product's factors to 2^-9 relative.
        backend: see the module.

    Returns:
        nll [P, T] in nats, in base's dtype (fp32 for bfloat16); with `kl` or `logit_difference`, a tuple of nll and
        what was asked for, in that order.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values.
        IndexError: a token outside [0, V) or a group outside [0, G). CUDA tensors are not read to check this.
        RuntimeError: a backend or precision that is not there.

    Source: the loss of "term importance" ablations in "A Mathematical Framework for Transformer Circuits"
    (Elhage et al. 2021), section "Two-Layer Attention-Only Transformers", computed from the path's rank-r term.
    """
    group = _checked_group(group, delta, basis)
    chosen = [("targets", targets), *_named_pair(logit_difference)]
    _check_sweep(base, delta, basis, group, scale, chosen)
    tokens = torch.stack([t.long() for _, t in chosen], -1)
    clean_lse = None
    if kl:
        nothing = (base.new_empty(1, len(base), 0), base.new_empty(1, 0, base.shape[1]))
        zero = torch.zeros(1, dtype=torch.long, device=base.device)
        clean_lse = sweep_statistics(base, *nothing, tokens[:, :0], zero, None, None, precision, backend)[0][0]
    lse, picked, change = sweep_statistics(base, delta, basis, tokens, group, scale, clean_lse, precision, backend)
    out = [lse - picked[..., 0]]
    if clean_lse is not None:
        out.append(lse - clean_lse - change)
    if logit_difference is not None:
        out.append(picked[..., 1] - picked[..., 2])
    dtype = torch.float32 if base.dtype == torch.bfloat16 else base.dtype
    results = tuple(x.to(dtype) for x in out)
    return results[0] if len(results) == 1 else results


def _named_pair(pair: tuple[Tensor, Tensor] | None) -> list[tuple[str, Tensor]]:
    return [] if pair is None else [(f"logit_difference[{i}]", tokens) for i, tokens in enumerate(pair)]


def _checked_group(group: Tensor | None, delta: Tensor, basis: Tensor) -> Tensor:
    for name, tensor, shape in (("delta", delta, "[P, T, r]"), ("basis", basis, "[G, r, V]")):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shape}")
    if group is None:
        if len(basis) != 1:
            raise ValueError(f"basis holds {len(basis)} groups, but group is None; say which each ablation uses")
        return torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    if group.is_floating_point() or group.dtype == torch.bool:
        raise TypeError(f"group has dtype {group.dtype}, expected integers")
    return group.long()


def _check_sweep(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    group: Tensor,
    scale: Tensor | None,
    tokens: list[tuple[str, Tensor]],
) -> None:
    if base.dim() != 2:
        raise ValueError(f"base has shape {list(base.shape)}, expected [T, V]")
    positions, vocabulary = base.shape
    pairs, _, rank = delta.shape
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("delta", delta, (pairs, positions, rank)),
        ("basis", basis, (len(basis), rank, vocabulary)),
        ("group", group, (pairs,)),
    ]
    expected += [(name, t, (positions,)) for name, t in tokens]
    if scale is not None:
        expected.append(("scale", scale, (pairs, positions)))
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} "
                f"(base is {list(base.shape)}, delta {list(delta.shape)})"
            )
        if tensor.device != base.device:
            raise ValueError(f"{name} is on {tensor.device}, but base is on {base.device}")
    if base.dtype not in DTYPES:
        raise TypeError(f"base has dtype {base.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("delta", delta), ("basis", basis)):
        if tensor.dtype != base.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but base has {base.dtype}")
    if vocabulary == 0:
        raise ValueError(f"base has shape {list(base.shape)}: an empty vocabulary")
    for name, tensor in tokens:
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    if base.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, tensor in tokens:
            check_range(name, tensor, vocabulary)
        check_range("group", group, len(basis))


def check_range(name: str, values: Tensor, end: int) -> None:
    """Raise IndexError, with the first offender and its place, unless all are in [0, end)."""
    bad = (values < 0) | (values >= end)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise IndexError(f"{name}{place} is {int(values[tuple(place)])}, expected 0 to {end - 1}")


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
        precision: "ieee", "tf32" or "bf16"; see the module. "bf16" rounds the factors to 2^-9 relative, which leaves
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
