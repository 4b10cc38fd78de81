"""The Triton kernels on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.attention_cases import Attention, assert_as_accurate_rows, eager, exact, forward, make

from pyfastcircuits import ops
from pyfastcircuits.kernels.frozen_attention import frozen_attention_triton

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def small(**options) -> Attention:
    return make(**({"S": 2, "B": 2, "H": 2, "kv": 1, "T": 70, "r": 9, "s": 5} | options))


def check(call: Attention) -> None:
    out, lse = frozen_attention_triton(*call, "ieee")
    assert out.dtype == (torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    assert_as_accurate_rows(call, (out, lse), eager(call), exact(call))
    if call.lse is None:
        again, none = frozen_attention_triton(*call._replace(lse=lse), "ieee")
        assert torch.equal(again.nan_to_num(7), out.nan_to_num(7))
        assert none.numel() == 0


@pytest.mark.matrix(transposed=[False, True], whole=[False, True], r=[0, 1, 9, 40])
def test_ranks(r: int, whole: bool, transposed: bool) -> None:
    check(small(r=r, whole=whole, transposed=transposed))


@pytest.mark.matrix(
    transposed=[False, True], shape=[(1, 1, 1, 1, 1, 1, 1), (3, 1, 6, 3, 33, 4, 30), (1, 2, 2, 2, 140, 16, 3)]
)
def test_shapes(shape: tuple[int, ...], transposed: bool) -> None:
    check(make(*shape, transposed=transposed))


@pytest.mark.matrix(name=["S", "B", "T", "s"], transposed=[False, True])
def test_empty(name: str, transposed: bool) -> None:
    check(small(transposed=transposed, **{name: 0}))


@pytest.mark.matrix(transposed=[False, True], window=[1, 3, 33, 64, 1000])
def test_windows(window: int, transposed: bool) -> None:
    check(small(T=140, H=1, B=1, window=window, transposed=transposed))


@pytest.mark.matrix(dtype=[torch.float32, torch.bfloat16, torch.float64], transposed=[False, True])
def test_dtypes_and_softcap(dtype: torch.dtype, transposed: bool) -> None:
    check(small(dtype=dtype, transposed=transposed, whole=True))
    for softcap in (0.01, 2.0, 1e4):
        check(small(dtype=dtype, transposed=transposed, softcap=softcap))


def test_rounded_factors() -> None:
    call = small()
    rounded = Attention(*(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in call))
    out, lse = frozen_attention_triton(*call, "bf16")
    truth = exact(rounded)
    torch.testing.assert_close(lse, truth[1], rtol=0, atol=1e-6)
    size = exact(rounded._replace(values=rounded.values.abs()))[0]
    assert ((out - truth[0]).abs() <= 2**-7 * size).all()  # the interpreter cuts weights off, a GPU rounds them


def test_huge_scores() -> None:
    for size in (1e4, 1e10):
        check(small(size=size))


def test_padding() -> None:
    call = small(whole=True)
    call.mask[0, :40], call.mask[1] = False, False
    check(call)
    out = frozen_attention_triton(*call, "ieee")[0]
    assert (out[:, 1] == 0).all()
    values = torch.where(call.mask[None, :, None, :, None], call.values, torch.nan)
    k = torch.where(call.mask[:, None, :, None], call.k, torch.nan)
    pre = torch.where(call.mask, call.pre, torch.nan)
    assert torch.equal(frozen_attention_triton(*call._replace(values=values, k=k, pre=pre), "ieee")[0], out)
    back = small(whole=True, transposed=True)._replace(mask=call.mask)
    back = back._replace(lse=exact(forward(back))[1])
    check(back)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_without_finite_scores_are_nan(value: float) -> None:
    call = small()
    call.q[0, 1, 40, 3] = value
    call.k[..., 3].abs_()
    check(call)


@pytest.mark.parametrize("transposed", [False, True])
def test_not_contiguous(transposed: bool) -> None:
    call = small(whole=True, transposed=transposed)
    strided = call._replace(
        q=call.q.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        k=call.k.repeat_interleave(2, 2)[:, :, ::2],
        values=call.values.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        lse=None if call.lse is None else call.lse.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        pre=call.pre.T.contiguous().T,
        post=call.post.repeat_interleave(2, 1)[:, ::2],
        mask=call.mask.T.contiguous().T,
    )
    for x, y in zip(frozen_attention_triton(*call, "ieee"), frozen_attention_triton(*strided, "ieee"), strict=True):
        assert torch.equal(x, y)


def test_gradients() -> None:
    call = small(S=1, T=7, r=3, s=2, whole=True, dtype=torch.float64)
    options = {"pre": call.pre, "post": call.post, "mask": call.mask, "window": 4, "backend": "triton"}
    values = call.values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: ops.frozen_attention(call.q, call.k, v, **options), (values,), fast_mode=True
    )


def test_typed_op() -> None:
    call = small()
    lse = ops.attention_lse(call.q, call.k, backend="triton")
    ours = ops.frozen_attention(call.q, call.k, call.values, lse, backend="triton")
    assert torch.equal(ours, frozen_attention_triton(*call, "ieee")[0])
    torch.testing.assert_close(ours, ops.frozen_attention(call.q, call.k, call.values, backend="cpu"))
    compiled = torch.compile(
        lambda v: ops.frozen_attention(call.q, call.k, v, backend="triton") * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(call.values), ours * 2)


def test_errors() -> None:
    call = small()
    with pytest.raises(ValueError, match=r"values has shape \[2, 2, 1, 69, 5\], expected \[2, 2, 1, 70, 5\]"):
        frozen_attention_triton(*call._replace(values=call.values[..., 1:, :]), "ieee")
    with pytest.raises(ValueError, match="lse is None, but the transposed form needs it"):
        frozen_attention_triton(*call._replace(transposed=True, values=call.values.expand(-1, -1, 2, -1, -1)), "ieee")
    with pytest.raises(TypeError, match=r"k has dtype torch.float64, but q has torch.float32"):
        frozen_attention_triton(*call._replace(k=call.k.double()), "ieee")
    with pytest.raises(ValueError, match=r"precision is 'tf32', but float64 tensors have only 'ieee'"):
        frozen_attention_triton(*small(dtype=torch.float64), "tf32")


def test_opcheck() -> None:
    for transposed in (False, True):
        call = small(T=9, whole=True, transposed=transposed)
        torch.library.opcheck(frozen_attention_triton, (*call, "ieee"))
        torch.library.opcheck(frozen_attention_triton, (*call._replace(values=call.values.requires_grad_()), "ieee"))
