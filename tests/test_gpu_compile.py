"""GPU code compiled for every architecture, on a machine without a GPU."""

import os
import re
import shutil
from collections.abc import Callable, Iterable

import pytest
import torch
from support.topk_cases import whole_numbers

import pyfastcircuits
from pyfastcircuits import ops

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from support.gpu_resources import (
    ARCHITECTURES,
    CUDA_LIBRARY,
    EXACT,
    PRODUCTS,
    TENSOR_CORES,
    AttentionVariant,
    Compiled,
    PairVariant,
    ProductVariant,
    Variant,
    attention_variants,
    compile_attention,
    compile_pairs,
    compile_product,
    compile_sweep,
    cuobjdump,
    pair_variants,
    product_variants,
    resources,
    variants,
)

MAIN = 90
Any = Variant | PairVariant | ProductVariant | AttentionVariant


def chosen(everything: Iterable[Any]) -> list[Any]:
    """All variants on one architecture; on each other one for each kernel, with every arithmetic met in its turn."""
    taken: list[Any] = []
    others: dict[tuple[str, int], list[Any]] = {}
    for variant in everything:
        if variant.arch == MAIN:
            taken.append(variant)
        else:
            others.setdefault((getattr(variant, "kernel", ""), variant.arch), []).append(variant)
    for turn, of_one in enumerate(others.values()):
        taken.append(of_one[turn % len(of_one)])
    return taken


@pytest.mark.parametrize("variant", chosen(variants()), ids=str)
def test_triton_sweeps(variant: Variant) -> None:
    check(variant, compile_sweep(variant))


@pytest.mark.parametrize("variant", chosen(pair_variants()), ids=str)
def test_triton_pair_norms(variant: PairVariant) -> None:
    check(variant, compile_pairs(variant))


@pytest.mark.parametrize("variant", chosen(product_variants()), ids=str)
def test_triton_products(variant: ProductVariant) -> None:
    compiled = compile_product(variant)
    check(variant, compiled)
    if variant.kernel == "factored_topk_entries":  # what it stores must be what the pass before has compared
        before = compile_product(variant._replace(kernel="factored_topk_segments"))
        assert compiled.tensor_instructions() == before.tensor_instructions()


@pytest.mark.parametrize(
    ("compiled", "variant"),
    [
        *((compile_sweep, v) for v in variants() if v.arch == MAIN and v.precision == "tf32"),
        *((compile_sweep, v) for v in variants() if v.arch == MAIN and v.kernel in EXACT and v.dtype == "float32"),
        *((compile_pairs, v) for v in pair_variants() if v.arch == MAIN and v.precision == "tf32"),
        *((compile_product, v) for v in product_variants() if v.arch == MAIN and v.dtype == "float32"),
        *((compile_attention, v) for v in attention_variants() if v.arch == MAIN and v.precision == "tf32"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_sizes_of_one(compiled: Callable[..., object], variant: object) -> None:
    """The launcher makes constants of integers that are 1, and constants have no methods."""
    compiled(variant, ones=True)


@pytest.mark.parametrize("variant", chosen(attention_variants()), ids=str)
def test_triton_frozen_attention(variant: AttentionVariant) -> None:
    check(variant, compile_attention(variant))


def check(variant: Any, compiled: Compiled) -> None:
    """It fits, nothing spills, and tensor cores multiply where they may."""
    [(_, _, used)] = resources(compiled.cubin)
    assert compiled.shared <= ARCHITECTURES[variant.arch]
    assert used.stack == used.local == 0, f"{variant} spills: {used}"
    kernel = getattr(variant, "kernel", "pair_norms")
    fp32 = kernel in PRODUCTS and variant.precision == "ieee" and variant.dtype == "float32"
    cores_of_cuda = fp32 or kernel in EXACT or variant.dtype == "float64"
    multiplying = {name for name in compiled.tensor_instructions() if ".f64" not in name}
    assert {name for name in multiplying if not name.startswith(TENSOR_CORES[variant.arch])} == set()
    assert bool(multiplying) != cores_of_cuda


@pytest.fixture(scope="module")
def cuda_library() -> None:
    if shutil.which("nvcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI compiles the CUDA kernels, and nvcc is not on PATH")
        pytest.skip("this machine has no nvcc")
    assert CUDA_LIBRARY.exists(), "nvcc is there, but the build left no _cuda.so"


@pytest.mark.usefixtures("cuda_library")
def test_cuda_library_holds_its_architectures() -> None:
    built = pyfastcircuits.build_info()["cuda_architectures"].split()
    wanted = {name.rstrip("a") for name in built if name.startswith("sm_")}  # the tool drops the a
    ptx = cuobjdump(CUDA_LIBRARY, "--list-ptx")
    assert ("sm_80" in ptx) == ("compute_80" in built)  # what newer GPUs compile
    assert set(re.findall(r"sm_\d+", cuobjdump(CUDA_LIBRARY, "--list-elf"))) == wanted
    kernels = resources(CUDA_LIBRARY)
    assert {arch.rstrip("a") for arch, _, _ in kernels} == wanted
    for arch, name, used in kernels:
        assert used.stack == used.local == 0, f"{name} spills on {arch}: {used}"


@pytest.mark.usefixtures("cuda_library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    A, B, shift = whole_numbers(4, 6, 3)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        torch.ops.pyfastcircuits.factored_topk.default.redispatch(key, A, B, 2, True, False, shift, "auto")
    with pytest.raises(RuntimeError, match="backend='cuda' needs a CUDA device"):
        ops.factored_topk(A, B, 2, backend="cuda")
