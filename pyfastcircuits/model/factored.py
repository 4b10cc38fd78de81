"""A matrix kept as a product of two, as every circuit of an attention head is one, and the algebra of such matrices."""

import warnings
from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import check_dense, describe, public
from pyfastcircuits.model.indexing import axes_of, expanded, kept_axis
from pyfastcircuits.modes import in_plain_modes


class FactoredMatrix:
    """The matrix A @ B [..., ldim, rdim], never formed: a drop-in for TransformerLens' class of the same name.

    Decompositions (`svd`, `norm`, `eigenvalues`) of 16-bit factors are computed and returned in float32; products stay
    in the factors' dtype. `svd` is kept until a factor is edited in place or replaced (edits that torch does not see,
    through `.data` or numpy, are not noticed). Beyond TransformerLens: `norm` from two QRs instead of three SVDs,
    gradients of `norm` and `S` that stay right where singular values repeat, sums of two, `to`, `device`, `dtype`,
    `...` and masks in an index.

    Args:
        A: [..., ldim, mdim].
        B: [..., mdim, rdim]; leading dimensions broadcast with A's.

    Attributes:
        A, B: the factors, broadcast to common leading dimensions (views).
        ldim, mdim, rdim: rows, inner dimension, columns.
        shape: of the product; `ndim` is its length.
        has_leading_dims: whether there are any.

    Raises:
        AssertionError: the inner dimensions differ.
        RuntimeError: "Shape mismatch", the leading dimensions do not broadcast.
        TypeError, ValueError: a factor is no dense tensor of at least 16 bits a number and two dimensions.

    The first two kinds of error, here and in the products, are those of TransformerLens.
    """

    __hash__ = object.__hash__
    # numpy arrays must not try to broadcast over a factored matrix
    __array_ufunc__ = None

    def __init__(self, A: Tensor, B: Tensor) -> None:
        """Check the factors and broadcast them; nothing is copied."""
        _check_factor("A", A)
        _check_factor("B", B)
        _check_device("A", A, "B", B)
        assert A.size(-1) == B.size(-2), (
            f"Factored matrix must match on inner dimension, shapes were a: {A.shape}, b: {B.shape}"
        )
        self.ldim, self.mdim, self.rdim = A.size(-2), A.size(-1), B.size(-1)
        self.has_leading_dims = A.ndim > 2 or B.ndim > 2
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise RuntimeError(
                f"Shape mismatch: leading dimensions do not broadcast, A has shape {A.shape}, B {B.shape}. {error}"
            ) from error
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self.A = A.broadcast_to((*leading, self.ldim, self.mdim))
        self.B = B.broadcast_to((*leading, self.mdim, self.rdim))

    def __repr__(self) -> str:
        """Shape and inner dimension."""
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"

    @property
    def ndim(self) -> int:
        """Dimensions of the product, leading ones included."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        return self.A, self.B

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.A.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product."""
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @public
    def to(self, *args: Any, **kwargs: Any) -> "FactoredMatrix":
        """The same matrix on another device or in another dtype; arguments as of torch.Tensor.to."""
        return type(self)(self.A.to(*args, **kwargs), self.B.to(*args, **kwargs))

    @public
    def size(self, dim: int) -> int:
        """One dimension of the product. TransformerLens' class asks its operands for it and for `broadcast_to`."""
        return self.shape[dim]

    @public
    def broadcast_to(self, shape: Sequence[int]) -> Tensor:
        """The product as a tensor: formed."""
        try:
            return self.AB.broadcast_to(shape)
        except (RuntimeError, TypeError) as error:
            raise type(error)(
                f"shape is {describe(shape, entries=True)}, expected one to broadcast {list(self.shape)} to"
            ) from error

    @property
    @public
    def AB(self) -> Tensor:
        """The product [..., ldim, rdim]: formed."""
        return self.A @ self.B

    @property
    @public
    def BA(self) -> Tensor:
        """The product the other way round [..., mdim, mdim]: its eigenvalues are the nonzero ones of AB.

        Raises:
            AssertionError: the matrix is not square.
        """
        assert self.rdim == self.ldim, f"Can only take BA if ldim==rdim, shapes were self: {self.shape}"
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        """The transpose of the last two dimensions."""
        return type(self)(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    @public
    def __matmul__(self, other: Any) -> Any:
        """The product with a (factored) matrix, factored; with a vector [rdim], the vector [..., ldim]."""
        if _is_factored(other):
            return (self @ other.A) @ other.B
        if not _is_like_tensor(other):
            return NotImplemented
        _check_device("the matrix", self, "other", other)
        if other.ndim < 2:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        assert other.size(-2) == self.rdim, (
            f"Right matrix must match on inner dimension, shapes were self: {self.shape}, other: {other.shape}"
        )
        if self.rdim > self.mdim:  # the smaller inner dimension is kept
            return type(self)(self.A, self.B @ other)
        return type(self)(self.AB, other)

    @public
    def __rmatmul__(self, other: Any) -> Any:
        """The product of a matrix with this one, factored; of a vector [ldim] with it, the vector [..., rdim]."""
        if not _is_like_tensor(other):
            return NotImplemented
        _check_device("the matrix", self, "other", other)
        assert other.size(-1) == self.ldim, (
            f"Left matrix must match on inner dimension, shapes were self: {self.shape}, other: {other.shape}"
        )
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        if self.ldim > self.mdim:
            return type(self)(other @ self.A, self.B)
        return type(self)(other, self.AB)

    def __mul__(self, scalar: Any) -> "FactoredMatrix":
        """This matrix times a number or a tensor of one element.

        Raises:
            AssertionError: the tensor has more elements.
        """
        if not isinstance(scalar, (Tensor, Number)):
            return NotImplemented
        assert not isinstance(scalar, Tensor) or scalar.numel() == 1, (
            f"Tensor must be a scalar for use with * but was of shape {scalar.shape}. "
            "For matrix multiplication, use @ instead."
        )
        factor: Any = scalar
        return type(self)(self.A * factor, self.B)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> "FactoredMatrix":
        """The sum with another factored matrix, by stacking the factors: inner dimensions add up.

        Raises:
            ValueError: the matrices have different sizes.
        """
        if not _is_factored(other):
            return NotImplemented
        if (self.ldim, self.rdim) != (other.ldim, other.rdim):
            raise ValueError(f"a sum of matrices of shape {list(self.shape)} and {list(other.shape)}")
        leading = torch.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        A = [x.A.expand(*leading, -1, -1) for x in (self, other)]
        B = [x.B.expand(*leading, -1, -1) for x in (self, other)]
        return type(self)(torch.cat(A, -1), torch.cat(B, -2))

    def __sub__(self, other: Any) -> "FactoredMatrix":
        """The difference, as a sum."""
        return self + other * -1 if _is_factored(other) else NotImplemented

    def __neg__(self) -> "FactoredMatrix":
        """The negative."""
        return self * -1

    @public
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition (U, S, V), with k = min(ldim, mdim, rdim); the second call is free.

        Returns:
            U [..., ldim, k], S [..., k] descending and V [..., rdim, k] (not its transpose): AB = U @ diag(S) @ V.T.
        """
        try:
            versions = self.A._version, self.B._version
        except RuntimeError:  # inference tensors count no edits
            return self._svd()
        key = (id(self.A), id(self.B), *versions, torch.is_grad_enabled())
        if self.__dict__.get("_kept_key") != key:
            self._kept_key, self._kept_svd = key, self._svd()
        return self._kept_svd

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B = computable(self.A), computable(self.B)
        left, left_triangle = torch.linalg.qr(A)
        right, right_triangle = torch.linalg.qr(B.transpose(-2, -1))
        try:
            U, S, Vh = torch.linalg.svd(left_triangle @ right_triangle.transpose(-2, -1), full_matrices=False)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError("A or B holds NaN or infinity: a matrix has singular values if it is finite") from error
        U, V = left @ U, right @ Vh.transpose(-2, -1)
        if S.requires_grad:  # dS = diag(U.T dM V): through the QRs it would be NaN for factors of lower rank
            S = ((U.detach().transpose(-2, -1) @ A) * (B @ V.detach()).transpose(-2, -1)).sum(-1)
        return U, S, V

    @property
    def U(self) -> Tensor:
        """Left singular vectors [..., ldim, k]."""
        return self.svd()[0]

    @property
    def S(self) -> Tensor:
        """Singular values [..., k], descending."""
        return self.svd()[1]

    @property
    def V(self) -> Tensor:
        """Right singular vectors [..., rdim, k]."""
        return self.svd()[2]

    @property
    def Vh(self) -> Tensor:
        """V under the name it once had in TransformerLens."""
        warnings.warn("FactoredMatrix.Vh is V, not its transpose: use .V", DeprecationWarning, stacklevel=2)
        return self.V

    @property
    @public
    def eigenvalues(self) -> Tensor:
        """Complex [..., mdim], in no order: those of AB, less zeros, or with zeros where mdim > ldim.

        Raises:
            AssertionError: the matrix is not square.
        """
        values: Tensor = torch.linalg.eigvals(computable(self.BA))
        return values

    @public
    def norm(self) -> Tensor:
        """Frobenius norm [...], in O((ldim + rdim) mdim^2) a matrix; differentiable for any factors."""
        norm: Tensor = _Norm.apply(computable(self.A), computable(self.B))
        return norm

    @public
    def make_even(self) -> "FactoredMatrix":
        """The same matrix as (U @ diag(S)**0.5) @ (diag(S)**0.5 @ V.T)."""
        root = self.S.sqrt()
        return type(self)(self.U * root[..., None, :], root[..., :, None] * self.V.transpose(-2, -1))

    @public
    def collapse_l(self) -> Tensor:
        """diag(S) @ V.T [..., k, rdim]: the matrix without its left orthogonal factor."""
        return self.S[..., :, None] * self.V.transpose(-2, -1)

    @public
    def collapse_r(self) -> Tensor:
        """U @ diag(S) [..., ldim, k]: the matrix without its right orthogonal factor."""
        return self.U * self.S[..., None, :]

    @public
    def get_corner(self, k: int = 3) -> Tensor:
        """The first k entries of every dimension of the product."""
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[(*leading, slice(k))] @ self.B[(*leading, slice(None), slice(k))]

    @public
    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """The same matrices with a new leading dimension at k."""
        if not -self.ndim - 1 <= k <= self.ndim:
            raise IndexError(f"k is {k}, expected {-self.ndim - 1} to {self.ndim}")
        return type(self)(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Index the product as a tensor, but an integer on one of the two matrix axes keeps it, with size 1.

        Tensors and lists on a matrix axis select from it alone: they are not paired with those on other axes.

        Raises:
            ValueError: there are more indices than dimensions.
            IndexError: an index is out of range, or there are two `...`.
        """
        entries = expanded(index if isinstance(index, tuple) else (index,), self.shape)
        kept: list[Any] = []
        new: list[int] = []  # how many matrix axes lie before each new axis
        axes, leading = 0, self.ndim - 2
        for entry in entries:
            if entry is None and axes >= leading:
                new.append(axes - leading)
            else:
                kept.append(entry)
                axes += axes_of(entry)
        matrix = kept[len(kept) - max(0, axes - leading) :]
        lead = tuple(kept[: len(kept) - len(matrix)])
        rows, columns = (*matrix, slice(None), slice(None))[:2]
        A = self.A[lead][..., kept_axis(rows, self.ldim), :]
        out = type(self)(A, self.B[lead][..., kept_axis(columns, self.rdim)])
        for before in new:
            if before == 0:
                out = out.unsqueeze(out.ndim - 2)
            elif before == 1:  # the rows become a leading dimension
                out = type(self)(out.A.unsqueeze(-2), out.B.unsqueeze(-3))
            else:  # the columns become the rows
                out = type(self)(out.B.transpose(-2, -1).unsqueeze(-3), out.A.unsqueeze(-1))
        return out


class _Norm(torch.autograd.Function):
    """||A B|| with the gradient written out: through singular values it is NaN where they repeat."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        left = torch.linalg.qr(_distinct(A), mode="r").R
        right = torch.linalg.qr(_distinct(B).transpose(-2, -1), mode="r").R
        norm: Tensor = torch.linalg.matrix_norm(left @ right.transpose(-2, -1)).expand(A.shape[:-2]).clone()
        ctx.save_for_backward(A, B, norm)
        return norm

    @staticmethod
    @in_plain_modes
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        A, B, norm = ctx.saved_tensors
        scale = torch.where(norm > 0, gradient / norm, 0)[..., None, None]  # the subgradient 0 at 0, as torch's norm
        return scale * (A @ (B @ B.transpose(-2, -1))), scale * ((A.transpose(-2, -1) @ A) @ B)


def _check_factor(name: str, factor: Any) -> None:
    if not _is_like_tensor(factor):
        raise TypeError(f"{name} is {describe(factor)}, expected a tensor")
    if isinstance(factor, Tensor):
        check_dense(name, factor)
        if factor.is_floating_point() and factor.itemsize < 2:
            raise TypeError(f"{name} has dtype {factor.dtype}, expected at least 16 bits a number")
        if factor.ndim < 2:
            raise ValueError(f"{name} has shape {list(factor.shape)}, expected at least two dimensions")


def _check_device(name: str, one: Any, other_name: str, other: Any) -> None:
    """Raise ValueError where two lie on two devices: torch multiplies by a meta tensor as if it held numbers."""
    devices = getattr(one, "device", None), getattr(other, "device", None)
    if isinstance(other, Tensor) and isinstance(one, (Tensor, FactoredMatrix)) and devices[0] != devices[1]:
        raise ValueError(f"{other_name} is on {devices[1]}, but {name} is on {devices[0]}")


def computable(x: Tensor) -> Tensor:
    """x in float32 if it is in a 16-bit type, which torch does not decompose.

    Raises:
        TypeError: it holds integers or bools, which torch does not decompose either.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"the matrix has dtype {x.dtype}, expected floating point")
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _distinct(x: Tensor) -> Tensor:
    """x without the copies that broadcasting made of its leading dimensions, which become 1."""
    for axis in range(x.ndim - 2):
        if x.stride(axis) == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    return x


def _is_like_tensor(other: Any) -> bool:
    """Whether it has what products ask of a tensor; TransformerLens multiplies by objects that only look like one."""
    return hasattr(other, "ndim") and callable(getattr(other, "size", None))


def _is_factored(x: Any) -> bool:
    """Whether x is a factored matrix, ours or TransformerLens'."""
    return isinstance(x, FactoredMatrix) or hasattr(x, "collapse_l")
