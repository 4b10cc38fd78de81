"""torch.ops.pyfastcircuits.* as they stand: what they say of wrong arguments, and that Ctrl-C ends them."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyfastcircuits  # noqa: F401

OPS = torch.ops.pyfastcircuits
FLOATS = "expected torch.float32, torch.float64 or torch.bfloat16"
POSITIVE = "expected a positive number that float32 holds"


def good_calls() -> dict[str, dict[str, Any]]:
    """Arguments of every op that it takes."""
    torch.manual_seed(0)
    sweep = {
        "base": torch.randn(4, 5),
        "delta": torch.randn(2, 4, 3),
        "basis": torch.randn(1, 3, 5),
        "tokens": torch.zeros(4, 1).long(),
        "group": torch.zeros(2).long(),
    }
    clean = {"clean_lse": torch.ones(4).double(), "mean": True, "precision": "ieee", "cap": 3.0}
    product = {"A": torch.randn(4, 3), "B": torch.randn(3, 5)}
    return {
        "sweep_nll": {**sweep, "scale": torch.ones(2, 4), **clean, "outer": None},
        "joint_nll": {**sweep, "pairs": torch.tensor([[0, 1]]), **clean},
        "logits_lse": {
            **{name: x for name, x in sweep.items() if name != "tokens"},
            "precision": "ieee",
            "cap": 3.0,
        },
        "target_ranks": {
            **sweep,
            "tokens": torch.zeros(4).long(),
            "thresholds": torch.zeros(2, 4).double(),
            "precision": "ieee",
        },
        "pair_norms": {
            "left": torch.randn(2, 3, 4),
            "right": torch.randn(3, 4, 2),
            "before": torch.ones(3).long(),
            "precision": "ieee",
        },
        "pair_grams": {
            "left": torch.randn(2, 3, 4),
            "right": [torch.randn(3, 4, 2), torch.randn(2, 4, 3)],
            "left_outer": torch.randn(2, 3, 3),
            "right_outer": [torch.randn(3, 2, 2), torch.randn(4, 3, 2)],
            "before": torch.ones(7).long(),
        },
        "triangles": {"factors": torch.randn(2, 6, 3)},
        "factored_topk": {
            **product,
            "k": 2,
            "largest": True,
            "per_row": False,
            "shift": torch.zeros(4),
            "screen": "none",
        },
        "diagonal_ranks": {**product, "columns": torch.zeros(4).long()},
        "frozen_attention": {
            "q": torch.randn(1, 2, 4, 2),
            "k": torch.randn(1, 1, 4, 2),
            "values": torch.randn(1, 1, 1, 4, 2),
            "lse": torch.zeros(1, 2, 4).double(),
            "pre": torch.ones(1, 4),
            "post": torch.ones(1, 4),
            "mask": torch.ones(1, 4) > 0,
            "scale": 1.0,
            "window": 3,
            "softcap": 2.0,
            "transposed": False,
            "precision": "ieee",
        },
        "cpu_rate": {"kind": "fma", "seconds": 0.001},
    }


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sweep_nll", {"base": torch.tensor(1.0)}, "base has shape [], expected [T, V]"),
    ("sweep_nll", {"base": torch.ones(4, 5).half()}, f"base has dtype torch.float16, {FLOATS}"),
    ("sweep_nll", {"delta": torch.ones(2, 4, 3).double()}, "delta has dtype torch.float64, but base has torch.float32"),
    ("sweep_nll", {"tokens": torch.zeros(4, 1)}, "tokens has dtype torch.float32, expected torch.int64"),
    ("sweep_nll", {"group": torch.tensor([0, 1])}, "group[1] is 1, expected 0 to 0"),
    ("sweep_nll", {"basis": torch.ones(0, 3, 5)}, "basis has shape [0, 3, 5]: no groups"),
    ("sweep_nll", {"outer": torch.ones(0, 3, 3)}, "outer has shape [0, 3, 3]: no groups"),
    ("sweep_nll", {"clean_lse": torch.ones(3)}, "clean_lse has shape [3], expected [4]"),
    ("sweep_nll", {"cap": 0.0}, f"cap is 0, {POSITIVE}"),
    ("sweep_nll", {"cap": torch.nan}, f"cap is nan, {POSITIVE}"),
    ("sweep_nll", {"cap": torch.inf}, f"cap is inf, {POSITIVE}"),
    ("sweep_nll", {"cap": 1e300}, f"cap is 1e+300, {POSITIVE}"),
    ("sweep_nll", {"precision": "fp8"}, "precision is 'fp8', expected 'ieee' or 'bf16' on the CPU"),
    ("joint_nll", {"pairs": torch.tensor([[0, 2]])}, "pairs[0, 1] is 2, expected 0 to 1"),
    ("joint_nll", {"pairs": torch.zeros(1, 3).long()}, "pairs has shape [1, 3], expected [1, 2]"),
    (
        "joint_nll",
        {"delta": torch.ones(0, 4, 3), "group": torch.zeros(0).long()},
        "pairs has shape [1, 2], but delta [0, 4, 3] holds no ablation",
    ),
    ("target_ranks", {"thresholds": torch.ones(2, 4)}, "thresholds has dtype torch.float32, expected torch.float64"),
    ("pair_norms", {"before": torch.ones(3)}, "before has dtype torch.float32, expected torch.int64"),
    ("pair_norms", {"right": torch.ones(3, 5, 2)}, "right has shape [3, 5, 2], expected [3, 4, 2]"),
    ("pair_grams", {"right": [], "right_outer": []}, "right is empty, expected at least one tensor"),
    ("pair_grams", {"right_outer": [torch.ones(3, 2, 2)]}, "right_outer has 1 tensors, but right has 2"),
    (
        "pair_grams",
        {"right_outer": [torch.ones(3, 2, 2), torch.ones(3, 3, 2)]},
        "right_outer[1] has shape [3, 3, 2], which does not fit right[1] [2, 4, 3]",
    ),
    (
        "pair_grams",
        {"right": [torch.ones(3, 4, 2), torch.ones(2, 5, 3)]},
        "right[1] has shape [2, 5, 3], but right[0] has [3, 4, 2]: their d differ",
    ),
    (
        "pair_grams",
        {"right_outer": [torch.ones(3, 2, 2), torch.ones(4, 3, 5)]},
        "right[1] makes factors of 5 rows or columns, but right[0] of 2",
    ),
    ("triangles", {"factors": torch.ones(2, 6, 3).long()}, f"factors has dtype torch.int64, {FLOATS}"),
    ("factored_topk", {"k": 0}, "k is 0, expected 1 to 20"),
    ("factored_topk", {"k": 21}, "k is 21, expected 1 to 20"),
    ("factored_topk", {"k": 6, "per_row": True}, "k is 6, expected 1 to 5"),
    ("factored_topk", {"B": torch.ones(2, 5)}, "A has shape [4, 3] and B [2, 5]: their inner dimensions r differ"),
    ("factored_topk", {"screen": "fp8"}, "screen is 'fp8', expected 'auto', 'none' or 'bf16'"),
    ("diagonal_ranks", {"columns": torch.tensor([0, 0, 5, 0])}, "columns[2] is 5, expected 0 to 4"),
    ("diagonal_ranks", {"B": torch.ones(3, 0)}, "B has shape [3, 0]: no columns"),
    ("frozen_attention", {"k": torch.ones(1, 3, 4, 2)}, "q has 2 heads, no multiple of k's 3"),
    ("frozen_attention", {"mask": torch.ones(1, 4)}, "mask has dtype torch.float32, expected torch.bool"),
    ("frozen_attention", {"window": 0}, "window is 0, expected at least 1"),
    ("frozen_attention", {"scale": -1.0}, f"scale is -1, {POSITIVE}"),
    ("frozen_attention", {"softcap": torch.inf}, f"softcap is inf, {POSITIVE}"),
    ("cpu_rate", {"seconds": torch.inf}, f"seconds is inf, {POSITIVE}"),
    ("cpu_rate", {"kind": "int8"}, "kind is 'int8', expected 'fma', 'exp' or 'bf16'"),
]
NUMBERS = {
    "sweep_nll": ("scale", "clean_lse"),
    "joint_nll": ("clean_lse",),
    "factored_topk": ("shift",),
    "frozen_attention": ("lse", "pre", "post"),
}
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "double": lambda x: x.double(),
    "int": lambda x: x.int(),
    "half": lambda x: x.half(),
    "complex": lambda x: x.to(torch.complex64),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "meta": lambda x: x.to("meta"),
    "none of them": lambda x: x[:0],
    "last of nothing": lambda x: x[..., :0],
    "one more": lambda x: torch.cat([x, x[:1]]),
    "no axis": lambda x: x.flatten()[0],
    "another axis": lambda x: x[None],
    "a thousand": lambda x: x * 0 + 1000 if x.dtype == torch.long else x.float() * torch.nan,
}
OTHERS: dict[type, list[Any]] = {
    float: [torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e300, 1e-300],
    int: [-(2**63), -1, 0, 2**63 - 1],
    str: ["", "zz", "../x.h:1"],
}


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(OPS, op)(**arguments)


def complaint(op: str, arguments: dict[str, Any]) -> str | None:
    """What the op says of its arguments; nothing where it takes them."""
    try:
        call(op, arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def wrong_values(value: Any) -> list[Any]:
    """What stands in the place of an argument."""
    if isinstance(value, list):
        changed = [[change(x) for x in value] for change in CHANGES.values()]
        return [*changed, [CHANGES["double"](value[0]), *value[1:]], value[:1], []]
    if isinstance(value, torch.Tensor):
        return [change(value) for change in CHANGES.values()]
    return OTHERS.get(type(value), [])


@pytest.mark.sanitize
@pytest.mark.parametrize(("op", "change", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_said_of_a_wrong_argument(op, change, message):
    with pytest.raises(RuntimeError) as error:
        call(op, good_calls()[op] | change)
    assert str(error.value) == message


@pytest.mark.sanitize
@pytest.mark.parametrize("op", NUMBERS)
def test_numbers_are_floating_point(op):
    good = good_calls()[op]
    for name in NUMBERS[op]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            call(op, good | {name: good[name].to(dtype)})
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.complex128, torch.float8_e5m2, torch.uint8):
            with pytest.raises(RuntimeError, match=rf"^{name} has dtype {dtype}, expected torch\.float32, "):
                call(op, good | {name: good[name].to(dtype)})


@pytest.mark.sanitize
@pytest.mark.parametrize("op", good_calls())
def test_wrong_arguments_are_named_and_nothing_of_ours_is(op):
    """Every argument in turn is wrong in every way: the call returns, or its error begins with an argument's name."""
    good = good_calls()[op]
    names = "|".join(good)
    call(op, good)
    for name, value in good.items():
        for wrong in wrong_values(value):
            said = complaint(op, good | {name: wrong})
            assert said is None or re.match(rf"({names})\b", said), (name, wrong, said)
            ours = (said or "").replace(wrong, "") if isinstance(wrong, str) else said or ""
            assert not re.search(r"::|\.\.|\.(h|cpp|cuh|cu|py)\b|\w\(", ours), (name, wrong, ours)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_triangles_of_factors_without_entries(dtype):
    """A matrix without columns is regular, one without rows is not."""
    for depth, rank in ((6, 0), (0, 3), (0, 0)):
        triangles, regular = OPS.triangles(torch.ones(2, depth, rank, dtype=dtype))
        assert triangles.shape == (2, rank, rank)
        assert not triangles.any()
        assert regular.tolist() == [rank == 0] * 2


LONG = [  # each takes many seconds
    "OPS.factored_topk(R(200_000, 64), R(64, 200_000), 10, True, False, None, 'none')",
    "OPS.diagonal_ranks(R(200_000, 64), R(64, 200_000), torch.zeros(200_000).long())",
    "OPS.pair_norms(R(1200, 64, 768), R(1200, 768, 64), None, 'ieee')",
    "OPS.pair_grams(R(1500, 64, 768), [R(1500, 768, 64)], None, [], None)",
    "OPS.sweep_nll(*SWEEP, torch.zeros(32, 1).long(), GROUP, None, torch.full((32,), 12.0), False, 'ieee')",
    "OPS.target_ranks(*SWEEP, torch.zeros(32).long(), GROUP, torch.zeros(4000, 32).double(), 'ieee')",
    "OPS.joint_nll(*SWEEP, torch.zeros(32, 1).long(), GROUP, GROUP.new_zeros(99_999, 2), torch.full((32,), 12.0), False, 'ieee')",
    "OPS.frozen_attention(*R(2, 1, 64, 8192, 64), R(1, 1, 64, 8192, 64), *[None] * 4, 0.1, None, None, False, 'ieee')",
    "OPS.cpu_rate('fma', 60.0)",
    "fc.ops.factored_topk(R(200_000, 64), R(64, 200_000), 10)",
    "fc.ops.diagonal_ranks(R(200_000, 64), R(64, 200_000))",
]
PROGRAM = """
import os, signal, sys, threading, time
import torch
import pyfastcircuits as fc

def R(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)  # faster than random numbers

OPS, GROUP = torch.ops.pyfastcircuits, torch.zeros(4000).long()
torch.set_num_threads(int(sys.argv[1]))
A, B = torch.randn(40, 8), torch.randn(8, 50)
expected = (A @ B).flatten().topk(5).values
SWEEP = R(32, 50_257), R(4000, 32, 64), R(1, 64, 50_257)

def interrupt():
    global sent
    sent = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)

for op in sys.argv[2:]:
    called, _, operands = op.partition("(")
    operands = eval(f"({operands}")  # made before the call, of which alone this is a test
    timer = threading.Timer(0.3, interrupt)
    try:
        timer.start()
        eval(called)(*operands)
        print("returned")
    except KeyboardInterrupt:
        print(time.perf_counter() - sent)
    torch.testing.assert_close(OPS.factored_topk(A, B, 5, True, False, None, "none")[0], expected)
"""


@pytest.mark.processes
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_ends_a_long_call(threads):
    """Within a second, here two; the next call gives right results."""
    command = [sys.executable, "-c", PROGRAM, str(threads), *LONG]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    waited = done.stdout.splitlines()
    assert len(waited) == len(LONG), done.stdout + done.stderr
    for op, seconds in zip(LONG, waited, strict=True):
        assert float(seconds) < 2, op


@pytest.mark.processes
def test_what_a_handler_raises_is_what_is_raised():
    code = """
import signal
import torch
import pyfastcircuits

def handler(*_):
    raise TimeoutError("too long")

signal.signal(signal.SIGALRM, handler)
try:
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    torch.ops.pyfastcircuits.cpu_rate("fma", 60.0)
except TimeoutError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "too long\n", done.stderr


@pytest.mark.processes
def test_other_threads_of_python_do_not_ask():
    """A call in a thread runs to its end, and the main thread gets the interrupt."""
    code = """
import os, signal, threading
import torch
import pyfastcircuits

rates = []
worker = threading.Thread(target=lambda: rates.append(torch.ops.pyfastcircuits.cpu_rate("fma", 1.0)))
worker.start()
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    threading.Event().wait(20)
except KeyboardInterrupt:
    worker.join()
    print(len(rates))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n", done.stderr
