"""What compiled kernels use: every Triton kernel of the package and every CUDA kernel of the build, without a GPU.

`python tests/support/gpu_resources.py` prints the table.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pyfastcircuits
from pyfastcircuits.kernels.common import ALIGNMENT
from pyfastcircuits.kernels.configs import arithmetic, choose
from pyfastcircuits.kernels.diagonal_ranks import diagonal_ranks_kernel
from pyfastcircuits.kernels.effects import CLEAN_OPTIONS, clean_kernel
from pyfastcircuits.kernels.exact import FULL_OPTIONS, TOKENS_OPTIONS, full_kernel, tokens_kernel
from pyfastcircuits.kernels.factored_topk import (
    factored_topk_entries_kernel,
    factored_topk_screen_kernel,
    factored_topk_segments_kernel,
)
from pyfastcircuits.kernels.frozen_attention import LSE_OPTIONS, attention_lse_kernel, frozen_attention_kernel
from pyfastcircuits.kernels.frozen_attention import OPTIONS as ATTENTION_OPTIONS
from pyfastcircuits.kernels.joint_nll import CAPPED_WARPS, joint_nll_kernel
from pyfastcircuits.kernels.logits_lse import logits_lse_kernel
from pyfastcircuits.kernels.pair_norms import pair_norms_kernel
from pyfastcircuits.kernels.sweep import OPTIONS as SWEEP_OPTIONS
from pyfastcircuits.kernels.sweep_nll import WIDE_OPTIONS, sweep_nll_kernel
from pyfastcircuits.kernels.target_ranks import target_ranks_kernel

ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448}  # shared memory a block may have
CUDA_LIBRARY = Path(pyfastcircuits.__file__).parent / "_cuda.so"
POINTERS = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16"}
KERNELS = {
    "sweep_nll": sweep_nll_kernel,
    "sweep_nll_capped": sweep_nll_kernel,
    "joint_nll": joint_nll_kernel,
    "joint_nll_capped": joint_nll_kernel,
    "logits_lse": logits_lse_kernel,
    "logits_lse_capped": logits_lse_kernel,
    "target_ranks": target_ranks_kernel,
    "tokens": tokens_kernel,
    "tokens_of_pairs_capped": tokens_kernel,
    "full": full_kernel,
    "full_of_pairs_capped": full_kernel,
    "clean": clean_kernel,
    "clean_capped": clean_kernel,
}
PRODUCTS = {
    "factored_topk_screen": factored_topk_screen_kernel,
    "factored_topk_segments": factored_topk_segments_kernel,
    "factored_topk_entries": factored_topk_entries_kernel,
    "diagonal_ranks": diagonal_ranks_kernel,
}
ATTENTION_KERNELS = {
    "attention_lse": attention_lse_kernel,
    "frozen_attention": frozen_attention_kernel,
    "frozen_attention_transposed": frozen_attention_kernel,
}
OPTIONS_OF_EXACT = {"tokens": TOKENS_OPTIONS, "full": FULL_OPTIONS, "clean": CLEAN_OPTIONS}
EXACT = tuple(name for name in KERNELS if name.partition("_")[0] in OPTIONS_OF_EXACT)  # in fp64, whatever the precision
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # as PTX names their instructions


class Variant(NamedTuple):
    """One specialisation of a kernel of sweep_nll, joint_nll, logits_lse or target_ranks."""

    kernel: str
    dtype: str
    precision: str
    rank: int
    whole: bool  # with a scale, where the kernel has one
    arch: int


class PairVariant(NamedTuple):
    """One specialisation of pair_norms' kernel."""

    dtype: str
    precision: str
    rank: int
    depth: int
    bounded: bool  # with before
    arch: int


class ProductVariant(NamedTuple):
    """One specialisation of a kernel of factored_topk or diagonal_ranks."""

    kernel: str
    dtype: str
    precision: str
    rank: int
    segment: int
    whole: bool  # with shift, and bounds from a screen
    arch: int


class AttentionVariant(NamedTuple):
    """One specialisation of one of frozen_attention's kernels."""

    kernel: str
    dtype: str
    precision: str
    rank: int
    whole: bool  # with pre, post, mask and a soft cap
    arch: int


class Compiled(NamedTuple):
    """What is made of one specialisation."""

    cubin: bytes
    shared: int  # dynamic shared memory, in bytes
    ptx: str  # which ptxas has made the cubin of

    def tensor_instructions(self) -> set[str]:
        """The kinds of tensor-core instructions, with types and most shapes; each becomes one of the machine code's.

        They are read from the PTX, because machine code takes as long to print as to compile.
        """
        return set(re.findall(rf"^\s*(?:@\S+\s+)?((?:{'|'.join(TENSOR_CORES.values())})\.[\w.:]+)", self.ptx, re.M))


class Resources(NamedTuple):
    """Of one compiled kernel, for each thread or block."""

    registers: int
    stack: int
    local: int
    shared: int


def variants() -> Iterator[Variant]:
    """What is compiled ahead: each arithmetic on each architecture, and the ranks past one tile on one.

    Of the later kernels less; of those with a soft cap what takes the most registers, and of those in fp64 no
    precision.
    """
    kinds = [("float32", precision) for precision in ("ieee", "tf32", "bf16")]
    every = [*kinds, ("float64", "ieee"), ("bfloat16", "ieee")]
    for arch in ARCHITECTURES:
        for dtype, precision in every:
            yield Variant("sweep_nll", dtype, precision, 64, False, arch)
            yield Variant("sweep_nll", dtype, precision, 64, True, arch)
    for dtype, precision in kinds:
        yield Variant("sweep_nll", dtype, precision, 512, False, 90)
    for kernel in ("joint_nll", "logits_lse", "target_ranks"):
        for dtype, precision in every:
            yield Variant(kernel, dtype, precision, 64, True, 90)
        for arch in (80, 100):
            yield Variant(kernel, "float32", "ieee", 64, True, arch)
        for dtype, precision in kinds[:2]:
            yield Variant(kernel, dtype, precision, 512, False, 90)
    for kernel in ("sweep_nll_capped", "joint_nll_capped", "logits_lse_capped"):
        for dtype, precision in (kinds[0], every[3]):
            yield Variant(kernel, dtype, precision, 64, True, 90)
    for kernel in EXACT:
        for dtype in POINTERS:
            yield Variant(kernel, dtype, "ieee", 64, True, 90)
        for arch in (80, 100):
            yield Variant(kernel, "float32", "ieee", 64, True, arch)


def pair_variants() -> Iterator[PairVariant]:
    """Heads of GPT-2 small in each arithmetic on each architecture; on one, those of GPT-2 XL and some in one step."""
    kinds = [("float32", precision) for precision in ("ieee", "tf32", "bf16")]
    for arch in ARCHITECTURES:
        for dtype, precision in [*kinds, ("float64", "ieee"), ("bfloat16", "ieee")]:
            yield PairVariant(dtype, precision, 64, 768, True, arch)
    for dtype, precision in kinds:
        yield PairVariant(dtype, precision, 80, 1280, True, 90)
        yield PairVariant(dtype, precision, 8, 16, False, 90)


def product_variants() -> Iterator[ProductVariant]:
    """Each arithmetic on each architecture; on one, more than one step of the rank and the segments of single rows."""
    for kernel in PRODUCTS:
        screen = kernel == "factored_topk_screen"
        kinds = [("float32", "bf16")] if screen else [(t, "ieee") for t in ("float32", "float64", "bfloat16")]
        for dtype, precision in kinds:
            for arch in ARCHITECTURES:
                yield ProductVariant(kernel, dtype, precision, 64, 128, screen or dtype == "float32", arch)
            for rank, segment in ((64, 16), (64, 8), (512, 128)):
                if kernel != "diagonal_ranks" or rank > 64:
                    yield ProductVariant(kernel, dtype, precision, rank, segment, segment == 16, 90)


def compile_product(variant: ProductVariant, ones: bool = False) -> Compiled:
    """Compiled as the launcher would for GPT-2 small's vocabulary."""
    name, dtype, precision, rank, segment, whole, arch = variant
    op = "diagonal_ranks" if name == "diagonal_ranks" else "factored_topk"
    kind = arithmetic(op, dtype, precision)
    config = choose(op, {"N": 50257, "M": 50257, "r": rank}, kind, arch)
    factor, work = "*bf16" if kind == "bf16" else POINTERS[dtype], "*fp64" if dtype == "float64" else "*fp32"
    types = {"A": factor, "B": factor, "slots": "*i32", "asked": "*i64", "ranks": "*i64"}
    types |= dict.fromkeys(("shift", "best", "upper", "lower", "floor", "row_norm", "column_norm", "found"), work)
    constants = {"DEPTH": rank, "SEGMENT": segment, "PER_ROW": segment < 128, **config.blocks}
    if not whole:
        constants |= {"shift": None}
        if name == "factored_topk_segments":
            constants |= {"upper": None, "floor": None}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _compiled(PRODUCTS[name], types, constants, {"stride"}, options, arch, ones)


def attention_variants() -> Iterator[AttentionVariant]:
    """Heads of GPT-2 small in each arithmetic on each architecture; on one, wider ones with all there is."""
    for kernel in ATTENTION_KERNELS:
        for dtype, precision in [
            *(("float32", x) for x in ("ieee", "tf32", "bf16")),
            ("float64", "ieee"),
            ("bfloat16", "ieee"),
        ]:
            for arch in ARCHITECTURES:
                yield AttentionVariant(kernel, dtype, precision, 64, False, arch)
            yield AttentionVariant(kernel, dtype, precision, 128, True, 90)


def compile_attention(variant: AttentionVariant, ones: bool = False) -> Compiled:
    """Compiled as the launcher would for 12 heads and 7 streams."""
    name, dtype, precision, rank, whole, arch = variant
    kind = arithmetic("frozen_attention", "float32" if dtype == "bfloat16" else dtype, precision)
    config = choose("frozen_attention", {"r": rank, "C": 7 * rank}, kind, arch)
    factor, work = "*bf16" if kind == "bf16" else POINTERS[dtype], "*fp64" if dtype == "float64" else "*fp32"
    types = dict.fromkeys(("q", "k", "to", "sources", "values"), factor)
    types |= dict.fromkeys(("high", "low", "before", "after", "mask", "out", "highest", "totals"), work)
    constants = {"DEPTH": rank, "WIDTH": rank, "SCALE": 0.125, "CAP": 50.0 if whole else None}
    constants |= {"TRANSPOSED": name.endswith("transposed"), "PRECISION": kind, **config.blocks}
    if not whole:
        constants |= dict.fromkeys(("before", "after", "mask"))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options |= LSE_OPTIONS if name == "attention_lse" else ATTENTION_OPTIONS
    return _compiled(ATTENTION_KERNELS[name], types, constants, {"positions", "window"}, options, arch, ones)


def compile_pairs(variant: PairVariant, ones: bool = False) -> Compiled:
    """Compiled as the launcher would for 144 heads."""
    dtype, precision, rank, depth, bounded, arch = variant
    kind = arithmetic("pair_norms", dtype, precision)
    config = choose("pair_norms", {"N": 144, "M": 144, "r": rank, "d": depth, "s": rank}, kind, arch)
    factor = "*bf16" if kind == "bf16" else POINTERS[dtype]
    types = {"left": factor, "right": factor, "squares": "*fp64" if dtype == "float64" else "*fp32", "before": "*i64"}
    constants = {"RANK": rank, "DEPTH": depth, "WIDTH": rank, "PRECISION": kind, **config.blocks}
    if not bounded:
        constants["before"] = None
    # The launcher finds both counts divisible, as the pointers are.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _compiled(pair_norms_kernel, types, constants, {"lefts", "rights"}, options, arch, ones)


def compile_sweep(variant: Variant, ones: bool = False) -> Compiled:
    """Compiled as the launcher would for GPT-2 small."""
    name, dtype, precision, rank, whole, arch = variant
    kernel = KERNELS[name]
    op = "sweep_nll" if name in EXACT else name.removesuffix("_capped")
    kind = arithmetic(op, dtype, precision)
    config = choose(op, {"P": 72, "S": 12, "T": 1024, "V": 50257, "r": rank, "G": 1}, kind, arch)
    element, work = POINTERS[dtype], "*fp64" if dtype == "float64" else "*fp32"
    factor = "*bf16" if kind == "bf16" else element
    types = {"base": element, "delta": factor, "basis": factor}
    types |= dict.fromkeys(
        ("references", "gains", "totals", "raised", "sizes", "means", "bounds", "products", "thresholds"), work
    )
    types |= dict.fromkeys(("scale", "clean_lse", "picked", "probabilities", "mean_base", "mean_basis"), "*fp64")
    types |= dict.fromkeys(("tokens", "order", "group", "starts", "first", "second", "ranks"), "*i64")
    types |= {"bar": element}
    limited = name.endswith("_capped")
    constants = {"RANK": rank, "PRECISION": kind, "CAP": 50.0 if limited else None, **config.blocks}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if name in EXACT:
        types |= dict.fromkeys(("gains", "totals", "means", "gain", "log_total", "mean"), "*fp64")
        constants |= dict.fromkeys(("mean_base", "mean_basis", "scale") if limited else ("first", "second"))
        options = dict(OPTIONS_OF_EXACT[name.partition("_")[0]])
        types |= {"mass": "*fp64"}
        constants |= {"LIMIT": 40.0, "COUNT": 16} | {
            block: options.pop(block) for block in list(options) if block.isupper()
        }
    elif not limited:
        constants |= {"means": None}
    if not whole:
        constants |= {"scale": None}
    if kernel in (sweep_nll_kernel, logits_lse_kernel):
        options |= WIDE_OPTIONS if kernel is sweep_nll_kernel and whole else SWEEP_OPTIONS
    if name == "joint_nll_capped":
        options["num_warps"] = CAPPED_WARPS
    return _compiled(kernel, types, constants, {"stride"} & set(kernel.arg_names), options, arch, ones)


def _compiled(
    kernel: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, object],
    divisible: set[str],
    options: dict[str, int],
    arch: int,
    ones: bool,
) -> Compiled:
    """All pointers, and the integers named `divisible`, are aligned.

    With `ones` all integers are 1, of which the launcher makes constants.
    """
    names = kernel.arg_names
    if ones:
        constants = dict.fromkeys(set(names) - types.keys(), 1) | constants
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {name for name in divisible if signature[name] != "constexpr"}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in divisible]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", ALIGNMENT]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    check_loops(compiled.asm)
    return Compiled(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ptx"])


def check_loops(asm: dict[str, str]) -> None:
    """Every loop that carries values in the kernel's text still does in what is compiled of it.

    Triton 3.6 took a scalar that a loop carried for what it was before the loop: on a GPU joint_nll was wrong, and in the
    interpreter it was not.
    """
    carrying = {kind: len(re.findall(r"scf\.for .*iter_args|scf\.while \(", asm[kind])) for kind in ("ttir", "ttgir")}
    assert carrying["ttgir"] >= carrying["ttir"], f"loops that carry values: {carrying}"


def cuobjdump(file: Path | bytes, *options: str) -> str:
    """The output of the tool, from PATH or Triton's package."""
    tool = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as written:
        if isinstance(file, bytes):
            written.write(file)
            written.flush()
            file = Path(written.name)
        return subprocess.run([tool, *options, file], capture_output=True, text=True, check=True).stdout


def resources(file: Path | bytes) -> list[tuple[str, str, Resources]]:
    """Architecture, name and resources of every kernel in a cubin or library."""
    found, arch = [], ""
    text = cuobjdump(file, "--dump-resource-usage")
    for m in re.finditer(r"arch = (\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
        arch = m[1] or arch
        if m[2]:
            found.append((arch, m[2], Resources(int(m[3]), int(m[4]), int(m[6]), int(m[5]))))
    return found


def sass(cubin: bytes) -> str:
    """Its machine code as text, which takes as long to make as the cubin."""
    return cuobjdump(cubin, "-sass")


def main() -> None:
    """Print the table."""
    kernels = [
        *((compile_sweep, "", v) for v in variants()),
        *((compile_pairs, "pair_norms ", v) for v in pair_variants()),
        *((compile_product, "", v) for v in product_variants()),
        *((compile_attention, "", v) for v in attention_variants()),
    ]
    print(f"{'kernel':76} {'arch':6} {'registers':>9} {'shared':>7} {'stack':>5}  tensor cores")
    for make, name, variant in kernels:
        compiled = make(variant)
        [(arch, _, used)] = resources(compiled.cubin)
        name = f"triton {name}{' '.join(map(str, variant[:-1]))}"
        instructions = " ".join(sorted(compiled.tensor_instructions()))
        print(
            f"{name:76} {arch:6} {used.registers:>9} {compiled.shared:>7} {used.stack:>5}  {instructions}", flush=True
        )
    for arch, name, used in resources(CUDA_LIBRARY) if CUDA_LIBRARY.exists() else []:
        print(f"{'cuda ' + name:76} {arch:6} {used.registers:>9} {used.shared:>7} {used.stack:>5}")


if __name__ == "__main__":
    main()
