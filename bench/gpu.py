"""`python -m bench.gpu [SECTION ...]`: builds, tests and measures on a CUDA GPU, and writes bench/RESULTS.md's table.

Sections run one by one in processes of their own; one that fails or takes too long is reported and the others go on.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.predictions import beside

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "RESULTS.md"
HEADING = "## GPU\n"
Row = dict[str, str]

P, T, V, r = 72, 1024, 50257, 64  # GPT-2 small, the ablations of one group
L, H, d = 12, 12, 768
BEST, ROW_BEST, CHUNK = 100, 10, 4096  # entries of a whole matrix, of a row; rows that torch multiplies at once
S, LONG = 13, 8192  # the streams of a graded pass of GPT-2 small, over a long context
CAPTIONS = {
    "sweep": f"`sweep_nll` and `target_ranks`, fp32, P={P}, T={T}, V={V:,}, r={r}, one group; errors of ranks are in ranks.",
    "joint": f"`joint_nll`, fp32, all pairs of {H} heads of one layer, T={T}, V={V:,}: r={d} with one basis for all, r={r} "
    f"with one each; the limit counts the heads' products.",
    "attention": f"`frozen_attention`, fp32, H={H}, T={LONG:,}, r={r}, {S} streams; one layer.",
    "pairs": f"`pair_norms`, fp32, the composition scores of {L}x{H} heads of one kind, d={d}, r={r}; relative errors.",
    "whole": f"What a user calls, random weights of GPT-2 small's shape without MLPs, T={T}: every pair of heads.",
    "entries": f"`factored_topk` and `diagonal_ranks`, fp32, one head's circuit: {V:,} x {V:,}, r={r}; the best {BEST} of "
    f"all, the best {ROW_BEST} of each row, ranks of the diagonal (the error is in ranks).",
}


def build() -> None:
    """Compile in place; kernels/ is where an installed package has it, by a link."""
    link = ROOT / "pyfastcircuits" / "kernels"
    if not link.exists():
        link.symlink_to(ROOT / "kernels")
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)


def tests() -> None:
    """Every op on the GPU against fp64."""
    jobs = ["-n", str(min(8, os.cpu_count() or 1))]  # what takes long is compiling kernels
    plain = ["-q", "-o", "addopts=", "-o", "filterwarnings=", "--tb=short", "--durations=8"]
    subprocess.run([sys.executable, "-m", "pytest", *plain, *jobs, "tests/gpu"], cwd=ROOT, check=True)


def sweep() -> Iterator[Row]:
    """sweep_nll beside what a user could write, and the limit of this GPU at rates measured here."""
    from pyfastcircuits import ops

    torch.manual_seed(0)
    base, basis = torch.randn(T, V, device="cuda"), torch.randn(1, r, V, device="cuda")
    delta, targets = torch.randn(P, T, r, device="cuda") / 8, torch.randint(V, (T,), device="cuda")

    def one_liner(base: Tensor, delta: Tensor, basis: Tensor, targets: Tensor) -> Tensor:
        logits = torch.addmm(base, delta, basis)
        return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]

    def by_pair(form: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.stack([form(base, each, basis[0], targets) for each in delta])

    exact = one_liner(base.double(), delta[0].double(), basis[0].double(), targets)
    flops = 2 * P * T * V * r
    forms: list[tuple[str, Callable[[], Tensor], float]] = [
        ("torch: logsumexp(addmm)", by_pair(one_liner), 0.0),
        ("torch.compile of it", by_pair(torch.compile(one_liner)), 0.0),
    ]
    for precision in ("bf16", "tf32", "ieee"):
        ours = partial(ops.sweep_nll, base, delta, basis, targets, precision=precision)
        forms.append((f"triton {precision}", ours, flops / matmul_rate(precision)))
    for name, form, limit in forms:
        yield measured(name, form, lambda out: (out[0].double() - exact).abs().max(), limit, flops, "ablations/s", P)
    logits = base.double() + delta[0].double() @ basis[0].double()
    ranks = (logits > logits.gather(-1, targets[:, None])).sum(-1)
    for precision in ("bf16", "tf32", "ieee"):
        limit = flops / matmul_rate(precision)
        form = partial(ops.target_ranks, base, delta, basis, targets, precision=precision)
        name = f"target_ranks: triton {precision}"
        yield measured(name, form, lambda out: (out[0] - ranks).abs().max(), limit, flops, "ablations/s", P)


def joint() -> Iterator[Row]:
    """joint_nll beside the singles' products, kept by torch, and a pass over them for each pair."""
    from pyfastcircuits import ops

    pairs = torch.combinations(torch.arange(H, device="cuda"))
    for rank, groups in ((d, 1), (r, H)):
        torch.manual_seed(0)
        base, basis = torch.randn(T, V, device="cuda"), torch.randn(groups, rank, V, device="cuda")
        delta, targets = torch.randn(H, T, rank, device="cuda") / rank**0.5, torch.randint(V, (T,), device="cuda")
        group = torch.arange(H, device="cuda") % groups
        flops = 2 * H * T * V * rank

        def one_pair(base: Tensor, one: Tensor, other: Tensor, targets: Tensor) -> Tensor:
            logits = base + one + other
            return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]

        def torch_form(
            form: Callable[..., Tensor],
            base: Tensor = base,
            delta: Tensor = delta,
            basis: Tensor = basis,
            group: Tensor = group,
            targets: Tensor = targets,
        ) -> Tensor:
            singles = [each @ basis[home] for each, home in zip(delta, group.tolist(), strict=True)]
            return torch.stack([form(base, singles[i], singles[j], targets) for i, j in pairs.tolist()])

        i, j = pairs[-1].tolist()
        changes = (delta[x].double() @ basis[group[x]].double() for x in (i, j))
        exact = one_pair(base.double(), *changes, targets)
        forms: list[tuple[str, Callable[[], Tensor], float]] = [
            ("torch: heads once, pair by pair", partial(torch_form, one_pair), 0.0),
            ("torch.compile of each pair", partial(torch_form, torch.compile(one_pair)), 0.0),
        ]
        for precision in ("bf16", "tf32", "ieee"):
            ours = partial(ops.joint_nll, base, delta, basis, targets, pairs, group=group, precision=precision)
            forms.append((f"triton {precision}", ours, flops / matmul_rate(precision)))
        for name, form, limit in forms:
            error = partial(lambda exact, out: (out[-1].double() - exact).abs().max(), exact)
            yield measured(f"r={rank}: {name}", form, error, limit, flops, "pairs/s", len(pairs))


def pairs() -> Iterator[Row]:
    """pair_norms beside a matrix product over all pairs, of which composition wants those with layer1 < layer2."""
    from pyfastcircuits import ops
    from pyfastcircuits.ops import reference

    torch.manual_seed(0)
    heads = (L - 1) * H  # the last layer is no source, the first no destination
    left = torch.randn(heads, r, d, device="cuda") / d**0.5
    right = torch.randn(heads, r, d, device="cuda").mT
    before = torch.arange(heads, device="cuda") // H * H + H
    wanted = torch.arange(heads, device="cuda")[:, None] < before
    count = L * (L - 1) // 2 * H * H
    flops = 2 * count * d * r * r
    exact = reference.pair_norms(left, right, before)

    def torch_form(precision: str) -> Callable[[], Tensor]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32

        def form() -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            product = left.to(dtype).flatten(0, 1) @ right.to(dtype).transpose(0, 1).flatten(1)
            torch.backends.cuda.matmul.allow_tf32 = False
            return product.view(heads, r, heads, r).norm(dim=(1, 3), dtype=torch.float32)

        return form

    def our_form(precision: str) -> Callable[[], Tensor]:
        return lambda: ops.pair_norms(left, right, before=before, precision=precision, backend="triton")

    def error(out: Tensor) -> Tensor:
        return ((out - exact).abs() / exact)[wanted].max()

    for precision in ("bf16", "tf32", "ieee"):
        limit = flops / matmul_rate(precision)
        yield measured(f"torch: matmul, norm {precision}", torch_form(precision), error, 0.0, flops, "pairs/s", count)
        yield measured(f"triton {precision}", our_form(precision), error, limit, flops, "pairs/s", count)


def entries() -> Iterator[Row]:
    """factored_topk and diagonal_ranks beside products in chunks of rows; the limit is one product, read by nobody."""
    from pyfastcircuits import ops

    torch.manual_seed(0)
    A, B = torch.randn(V, r, device="cuda") / r**0.5, torch.randn(r, V, device="cuda")
    flops = 2 * V * V * r
    limits = {screen: flops / matmul_rate(rate) for screen, rate in (("none", "fp32"), ("bf16", "bf16"))}
    forms = (("triton", "bf16"), ("triton", "none"), ("cuda", "none"))

    def chunks(A: Tensor, B: Tensor) -> Iterator[Tensor]:
        return (A[first : first + CHUNK] @ B for first in range(0, V, CHUNK))

    def torch_best(A: Tensor, B: Tensor, k: int, per_row: bool) -> Tensor:
        found = [(x if per_row else x.flatten()).topk(k).values for x in chunks(A, B)]
        return torch.cat(found) if per_row else torch.cat(found).topk(k).values

    def torch_ranks(A: Tensor, B: Tensor) -> Tensor:
        return torch.cat([(x > x.diagonal(i * CHUNK)[:, None]).sum(1) for i, x in enumerate(chunks(A, B))])

    def row(name: str, form: Callable[[], Tensor], exact: Tensor, limit: float) -> Row:
        return measured(name, form, lambda out: (out - exact).abs().max(), limit, flops, "products/s", 1)

    for name, k, per_row in ((f"best {BEST}", BEST, False), (f"best {ROW_BEST} of each row", ROW_BEST, True)):
        exact = torch_best(A.double(), B.double(), k, per_row)
        yield row(f"{name}: torch in chunks", partial(torch_best, A, B, k, per_row), exact, 0.0)
        for backend, screen in forms:
            ours = partial(ops.factored_topk, A, B, k, per_row=per_row, screen=screen, backend=backend)
            yield row(f"{name}: {backend}, screen {screen}", lambda ours=ours: ours().values, exact, limits[screen])
    exact = torch_ranks(A.double(), B.double())
    yield row("ranks: torch in chunks", partial(torch_ranks, A, B), exact, 0.0)
    yield row("ranks: triton", partial(ops.diagonal_ranks, A, B), exact, limits["none"])


def attention() -> Iterator[Row]:
    """frozen_attention beside torch's attention, a stream at a time: its fast kernels want values as wide as keys."""
    from pyfastcircuits import ops

    torch.manual_seed(0)
    q, k = torch.randn(2, 1, H, LONG, r, device="cuda")
    values = torch.randn(S, 1, H, LONG, r, device="cuda")
    rows = slice(0, 1024)
    exact = ops.frozen_attention(q[..., rows, :].double(), k[..., rows, :].double(), values[..., rows, :].double())
    entries = H * LONG * (LONG + 1) / 2
    flops = 2 * entries * r * (1 + S)

    def torch_form(dtype: torch.dtype) -> Callable[[], Tensor]:
        cast = [x.to(dtype) for x in (q, k, values)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: torch.stack([attend(cast[0], cast[1], v, is_causal=True) for v in cast[2]])

    def our_form(precision: str) -> Callable[[], Tensor]:
        lse = ops.attention_lse(q, k, precision=precision)
        return lambda: ops.frozen_attention(q, k, values, lse, precision=precision)

    def error(out: Tensor) -> Tensor:
        return (out[..., rows, :].double() - exact).abs().max()

    exps = entries / exp_rate()
    yield measured("torch: attention, bfloat16", torch_form(torch.bfloat16), error, 0.0, flops, "streams/s", S)
    yield measured("torch: attention, float32", torch_form(torch.float32), error, 0.0, flops, "streams/s", S)
    for precision in ("bf16", "tf32", "ieee"):
        limit = flops / matmul_rate(precision) + exps
        yield measured(f"triton {precision}", our_form(precision), error, limit, flops, "streams/s", S)


def whole() -> Iterator[Row]:
    """What a user calls, on random weights of GPT-2 small's shape: one trace, every pair of heads, every score."""
    import pyfastcircuits as fc

    torch.manual_seed(0)
    heads = [torch.randn(L, H, d, r, device="cuda") / d**0.5 for _ in range(3)]
    W_O = torch.randn(L, H, r, d, device="cuda") / (H * r) ** 0.5
    W_E, W_U = torch.randn(V, d, device="cuda"), torch.randn(d, V, device="cuda") / d**0.5
    weights = fc.CircuitWeights(W_E, *heads, W_O, W_U, positional="none")
    tokens = torch.randint(V, (1, T), device="cuda")
    run = fc.trace(weights, tokens)
    pairs = L * (L - 1) // 2 * H * H
    flops = 2 * pairs * T * V * r
    exact = fc.pair_ablation(run, "path", pairs=[[(0, 0), (1, 0)]], precision="ieee").values[0]
    for precision in ("bf16", "tf32", "ieee"):
        limit = flops / matmul_rate(precision)
        form = partial(fc.pair_ablation, run, "path", precision=precision)
        error = partial(lambda exact, out: (out.values[0] - exact).abs().max(), exact)
        yield measured(f"pair_ablation: {precision}", form, error, limit, flops, "pairs/s", pairs, runs=3)
    for kind in ("Q", "K", "V"):
        form = partial(fc.composition_scores, weights, kind)
        theirs = fc.composition_scores(weights, kind, backend="reference")
        error = partial(lambda theirs, out: (out - theirs).abs().nan_to_num().max(), theirs)
        yield measured(f"composition_scores: {kind}", form, error, 0.0, 2 * pairs * d * r * r, "pairs/s", pairs)


def measured(
    name: str,
    form: Callable[[], Tensor],
    error: Callable[[Tensor], Tensor],
    limit: float,
    flops: float,
    unit: str,
    count: int,
    runs: int = 7,
) -> Row:
    """One row: `flops` are those that are wanted, `limit` the seconds they would take at the rates measured here."""
    try:
        worst = error(form()).item()
        taken, memory = seconds(form, runs), peak_memory(form)
    except Exception as problem:
        return {"form": name, "failed": repr(problem)[:80]}
    return {
        "form": name,
        "ms": f"{1e3 * taken:.2f}",
        unit: f"{count / taken:.{0 if count > 1 else 1}f}",
        "TFLOP/s": f"{flops / taken / 1e12:.1f}",
        "of the limit": f"{limit / taken:.0%}" if limit else "",
        "peak MiB": f"{memory / 2**20:.0f}",
        "max error": f"{worst:.1e}",
    }


def seconds(work: Callable[[], object], runs: int = 7) -> float:
    """Median of so many runs, by events, after one to warm up."""
    work()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes allocated at most, beyond what was."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_rate(precision: str) -> float:
    """FLOP/s of torch's matrix product; "ieee" is three of TF32."""
    if precision == "ieee":
        return matmul_rate("tf32") / 3
    n = 8192
    x = torch.randn(n, n, device="cuda", dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        return 2 * n**3 / seconds(lambda: x @ x)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def exp_rate() -> float:
    """Powers of 2 a second in registers, by a kernel that does nothing else."""
    import triton

    from bench.exp_rate import REPEATS, SIZE, exp_kernel

    count = 132 * 64
    out = torch.empty(count * SIZE, device="cuda")
    return count * SIZE * REPEATS / seconds(lambda: exp_kernel[(count,)](out, num_warps=triton.cdiv(SIZE, 256)))


def compile_kernels() -> None:
    """Everything that is measured once, side by side: kernels are compiled while none of them is timed."""
    run = "from bench.gpu import SECTIONS; [print(row) for row in SECTIONS[{!r}][0]()]"
    commands = [[sys.executable, "-c", run.format(name)] for name in CAPTIONS]
    for started in [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for command in commands]:
        started.wait()


SECTIONS: dict[str, tuple[Callable[[], Iterator[Row] | None], int]] = {  # seconds each may take: one call has 500
    "build": (build, 110),
    "tests": (tests, 200),
    "compile": (compile_kernels, 90),
    "sweep": (sweep, 70),
    "joint": (joint, 70),
    "pairs": (pairs, 25),
    "entries": (entries, 50),
    "attention": (attention, 40),
    "whole": (whole, 60),
}


def main() -> int:
    """Run all sections, or those that are named, write the table, and return the number that failed."""
    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA GPU here; nothing was built or measured")
        return 2
    failed: list[str] = []
    tables: dict[str, list[Row]] = {}
    chosen = sys.argv[1:] or list(SECTIONS)
    for name in chosen:
        limit = SECTIONS[name][1]
        print(f"-- {name}", flush=True)
        command = [sys.executable, "-c", f"from bench.gpu import run_section; run_section({name!r})"]
        table = ROOT / "build" / f"gpu-{name}.json"
        table.parent.mkdir(exist_ok=True)
        table.unlink(missing_ok=True)
        try:
            subprocess.run(command, cwd=ROOT, check=True, timeout=limit, env=os.environ | {"FC_TABLE": str(table)})
        except subprocess.CalledProcessError as problem:
            failed.append(f"{name}: exit status {problem.returncode}")
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: not done after {limit} s")
        tables[name] = json.loads(table.read_text()) if table.exists() else []
        failed += [f"{name}: {row['form']}: {row['failed']}" for row in tables[name] if "failed" in row]
    write(tables, failed)
    print("\n".join(["FAILED:", *failed]) if failed else "all sections passed")
    return len(failed)


def run_section(name: str) -> None:
    """In a section's own process: run it and leave its rows, beside their predictions, as many as there are, for main."""
    rows: list[Row] = []
    for found in SECTIONS[name][0]() or ():
        row = beside(found, name, torch.cuda.get_device_name())
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        Path(os.environ["FC_TABLE"]).write_text(json.dumps(rows))


def write(tables: dict[str, list[Row]], failed: list[str]) -> None:
    """Replace the GPU section of RESULTS.md."""
    import triton

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    facts = [
        torch.cuda.get_device_name(),
        f"torch {torch.__version__}",
        f"Triton {triton.__version__}",
        f"Python {platform.python_version()}",
        f"commit {commit}",
        str(datetime.datetime.now(datetime.timezone.utc).date()),
    ]
    lines = [HEADING, ", ".join(facts) + "."]
    for name, caption in CAPTIONS.items():
        rows = tables.get(name, [])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", caption, ""]
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(row.get(key, "") for key in columns) + " |" for row in rows]
    lines += ["", *(f"- Failed: {problem}" for problem in failed)]
    before, _, after = RESULTS.read_text().partition(HEADING)
    rest = after.partition("\n## ")
    RESULTS.write_text(before + "\n".join(lines).rstrip() + "\n" + (f"\n## {rest[2]}" if rest[1] else ""))


if __name__ == "__main__":
    sys.exit(main())
