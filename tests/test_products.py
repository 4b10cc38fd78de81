"""Large fp32 products by oneDNN are torch's own to rounding, whatever their layout, and never its slow reference."""

import subprocess
import sys

import pytest
import torch
from support.accuracy import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

from pyfastcircuits.ops import onednn as products


def matrices(layout):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(70, 130, generator=g), torch.randn(130, 600, generator=g)
    return {
        "rows": (left, right),
        "columns": (left, right.mT.contiguous().mT),
        "a slice": (left, right[:, 3:500]),
        "strided": (left[::2], right[:, ::3]),
        "batch of one": (left[None], right[None]),
    }[layout]


class Seen(TorchDispatchMode):
    """The factors that oneDNN is given."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_linear_pointwise" in str(func):
            self.factors = args[:2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["rows", "columns", "a slice", "strided", "batch of one"])
def test_products(layout, monkeypatch):
    left, right = matrices(layout)
    monkeypatch.setattr(products, "SMALLEST", 1)
    with Seen() as seen, products.OneDnnMatmul():
        ours = torch.bmm(left, right) if left.dim() == 3 else left @ right
    assert_as_accurate(ours, left @ right, left.double() @ right.double(), tiny=1e-4)
    if torch.backends.mkldnn.is_available():
        assert all(x.is_contiguous() or x.mT.is_contiguous() for x in seen.factors)


def test_no_large_copies(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "COPIED", 4 * 130 * 497 - 1)
    left, right = matrices("a slice")
    with Seen() as seen, products.OneDnnMatmul():
        ours = left @ right
    assert torch.equal(ours, left @ right)
    assert not hasattr(seen, "factors")


def test_biases_and_gradients(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 1)
    left, right = (x.requires_grad_() for x in matrices("rows"))
    bias = torch.randn(600, requires_grad=True)
    with products.OneDnnMatmul():
        ours = torch.autograd.grad(torch.addmm(bias, left, right).square().sum(), (bias, left, right))
    theirs = torch.autograd.grad(torch.addmm(bias, left, right).square().sum(), (bias, left, right))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


def multiplied_by_torch(monkeypatch) -> bool:
    monkeypatch.setattr(products, "SMALLEST", 1)
    left, right = matrices("rows")
    with Seen() as seen, products.OneDnnMatmul():
        ours = left @ right
    return not hasattr(seen, "factors") and torch.equal(ours, left @ right)


def test_torch_is_one_whose_operator_is_known():
    """A torch that fails this has changed it: see what SCHEMA says, and whether products are as exact and as fast."""
    assert products.available() == torch.backends.mkldnn.is_available()


def test_the_switch(monkeypatch):
    monkeypatch.setenv("PYFASTCIRCUITS_ONEDNN", "0")
    assert multiplied_by_torch(monkeypatch)
    monkeypatch.setenv("PYFASTCIRCUITS_ONEDNN", "1")
    assert multiplied_by_torch(monkeypatch) != products.available()


def test_a_torch_without_the_operator_multiplies_itself(monkeypatch):
    products.available.cache_clear()
    monkeypatch.setattr(products, "SCHEMA", "another")
    assert not products.available()
    assert multiplied_by_torch(monkeypatch)
    products.available.cache_clear()


def test_the_compiler_is_not_imported():
    """Torch would import it at the first product, which takes a second."""
    code = (
        "import sys, torch; from pyfastcircuits.ops.onednn import OneDnnMatmul\n"
        "with OneDnnMatmul(): torch.ones(2048, 1024) @ torch.ones(1024, 1024)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
