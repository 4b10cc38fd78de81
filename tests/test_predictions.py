"""Predicted times: what is counted in the machine code, against counts by hand, and against the committed table."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1]))  # bench is no installed package

import pyfastcircuits
from bench import predictions, sass
from bench.gpu import CAPTIONS, LONG, RESULTS, H, L, P, S, T, V, d, r
from bench.launches import Launch, Work, works
from bench.pipes import GPUS
from bench.predict import count, predict, table_of

MAIN = 90
ALSO = ("sweep: triton bf16", "joint: r=64: triton bf16", "pairs: triton bf16", "attention: triton bf16")


def gated() -> list[object]:
    """All rows on one architecture, on each other one those of the kernels that differ most."""
    found = list(works(MAIN))
    found += [work for arch in (80, 100) for work in works(arch) if work.name in ALSO]
    return [pytest.param(work, id=f"{work.name}, sm_{work.launches[0].arch}") for work in found]


@pytest.mark.parametrize("work", gated())
def test_no_prediction_departs_from_the_table(work: Work) -> None:
    """It is as cheap to be told of a gain, and a gain that is not written down is not held."""
    built = pyfastcircuits.build_info()["cuda_architectures"].split()
    if any(launch.compiler is None for launch in work.launches) and "sm_90a" not in built:
        pytest.skip(f"CUDA kernels are built for {built}")
    if problems := predictions.departures(table_of(work), predictions.committed()):
        pytest.fail("\n".join(problems), pytrace=False)


def launch_of(name: str, row: str) -> Launch:
    [found] = [x for work in works(MAIN) for x in work.launches if x.name == name and work.name == row]
    return found


def test_one_kernel_counted_by_hand() -> None:
    """frozen_attention in bfloat16 on sm_90: 128 queries, 32 keys and 256 columns of values make a tile; 8 warps."""
    launch = launch_of("frozen_attention", "attention: triton bf16")
    counted = count(launch)
    tiles = 130  # of 128 queries at 8,192 positions: 4, 8, ..., 256
    programs = 64 * H * 4  # blocks of queries, heads, blocks of 13 x 64 columns
    assert launch.programs == programs
    opcodes = {name: times / tiles for name, times in counted.opcodes().items()}
    # Scores are 128 x 32, 64 deep: two warpgroups with 64 rows each take 4 steps. Each of their 8 warps counts.
    assert opcodes["HGMMA.64x32x16.F32.BF16"] == 8 * 4
    # The pattern times the values is 128 x 256, 32 deep.
    assert opcodes["HGMMA.64x256x16.F32.BF16"] == 8 * 2
    # A score is scaled, loses both parts of its logsumexp, and is scaled again for the power of 2.
    scores = 128 * 32 / 32
    assert opcodes["MUFU.EX2"] == scores
    assert opcodes["FMUL"] == pytest.approx(2 * scores, rel=0.01)
    assert opcodes["FADD"] == pytest.approx(2 * scores, rel=0.01)
    assert opcodes["F2FP.BF16.F32.PACK_AB"] == scores / 2
    flops = 2 * 128 * 32 * (r + 256)
    assert counted.flops == tiles * flops

    found = predict(launch, counted, GPUS["H200"])
    busiest = 24  # programs, of 3,072 on 132 multiprocessors
    assert found.pipes["tensor"] == pytest.approx(1e3 * busiest * tiles * flops / (989.4e12 / 132))
    assert found.pipes["mufu"] == pytest.approx(1e3 * busiest * tiles * scores * 32 / 16 / 1.98e9, rel=0.01)
    read_and_written = LONG * H * r * (2 + 2 + S * 2 + S * 4)
    assert found.pipes["memory"] == pytest.approx(1e3 * read_and_written / 4.8e12)
    assert found.ms == max(found.pipes.values()) == found.pipes[found.binding]
    units = ("tensor", "fma", "alu", "mufu", "fp64", "lsu")
    assert found.in_turn == pytest.approx(sum(found.pipes[unit] for unit in units))


@pytest.mark.parametrize(
    ("name", "row", "flops"),
    [
        ("sweep_nll", "sweep: triton bf16", 2 * P * T * V * r),
        ("sweep_nll", "sweep: triton tf32", 2 * P * T * V * r),
        ("joint_nll", "joint: r=768: triton bf16", 2 * H * T * V * d),
        ("pair_norms", "pairs: triton bf16", 2 * (L * (L - 1) // 2 * H * H) * d * r * r),
        ("factored_topk_screen", "entries: best 100: triton, screen bf16", 2 * V * V * r),
    ],
)
def test_products_are_those_asked_for(name: str, row: str, flops: float) -> None:
    """As many FLOPs on tensor cores as the shapes have, and at most a hundredth more, past the ends of the tiles."""
    launch = launch_of(name, row)
    assert flops <= launch.programs * count(launch).flops <= 1.01 * flops


def test_fp32_products_are_those_asked_for() -> None:
    launch = launch_of("diagonal_ranks", "entries: ranks: triton")
    multiplied = 32 * launch.programs * count(launch).opcodes()["FFMA"]
    assert V * V * r <= multiplied <= 1.03 * V * V * r  # and the tile of a block's own entries


CODE = """
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R0, R0, 1 ;
        /*0020*/              @P0  BRA 0x50 ;
        /*0030*/                   DMUL R2, R2, R2 ;
        /*0040*/                   DMUL R2, R2, R2 ;
        /*0050*/                   MUFU.EX2 R0, R0 ;
        /*0060*/              @!P1 FFMA R0, R0, R0, R0 ;
        /*0070*/              @P2  BRA 0x60 ;
        /*0080*/              @P1  BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_loops_and_the_way_through_them() -> None:
    [(_, name, code)] = sass.functions(CODE)
    assert name == "kernel"
    assert [x.name for x in code if x.guard] == ["BRA", "FFMA", "BRA", "BRA"]
    blocks = sass.blocks_of(code)
    whole = sass.region_of(blocks)
    [outer] = whole.inner
    [inner] = outer.inner
    assert [x.name for x in blocks[inner.head].instructions] == ["FFMA", "BRA"]

    def passed(marked: str) -> list[str]:
        way, loops = sass.way_through(blocks, outer, {inner.head}, lambda x: x.name == marked, 1)
        assert loops == [inner]
        return [x.name for i in sorted(way) for x in blocks[i].instructions]

    assert passed("MUFU") == ["FADD", "BRA", "MUFU", "BRA"]
    assert passed("DMUL") == ["FADD", "BRA", "DMUL", "DMUL", "MUFU", "BRA"]


def test_departures_are_told_with_what_accepts_them() -> None:
    table = {"a": {"H200": [1.0, 2.0]}, "b": {"H200": [1.0, 2.0]}, "c": {"H200": [1.0, 2.0]}}
    now = {"a": {"H200": [1.09, 2.1]}, "b": {"H200": [1.11, 2.1]}, "c": {"H200": [1.0, 1.7]}, "e": {"H200": [1.0, 2.0]}}
    slower, faster, new = predictions.departures(now, table)
    assert slower == (
        "b on H200 is predicted to be slower by the busiest pipe: 1.11 ms, before 1 ms. "
        "`make predict` accepts it: it writes the table anew."
    )
    assert "c on H200 is predicted to be faster by all pipes in turn: 1.7 ms, before 2 ms" in faster
    assert "e on H200 is not in bench/predictions.json" in new


def test_predictions_stand_beside_measurements() -> None:
    row = {"form": "triton bf16", "ms": "2.76", "peak MiB": "22"}
    assert list(predictions.beside(row, "sweep", "NVIDIA H200")) == ["form", "ms", "predicted ms", "peak MiB"]
    assert " to " in predictions.beside(row, "sweep", "NVIDIA H100 80GB HBM3")["predicted ms"]
    assert predictions.beside(row, "whole", "NVIDIA H200")["predicted ms"] == ""
    gpu, ratios = predictions.ratios(RESULTS.read_text(), list(CAPTIONS), predictions.committed())
    assert gpu in GPUS
    assert {"pairs: triton bf16", "entries: ranks: triton", "attention: triton tf32"} <= ratios.keys()
    assert "joint: r=64: triton bf16" not in ratios  # its kernel is another now
