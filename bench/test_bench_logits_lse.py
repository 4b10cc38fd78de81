"""`logits_lse` on the CPU: logsumexps of logits that a product makes, beside torch and the rates of this machine."""

import statistics

import torch

from bench.sweep_inputs import P, R, T, V, sweep_inputs
from bench.timing import cpu_rate, interleaved, ratio
from pyfastcircuits import ops


def test_logits_lse(found):
    base, delta, basis, _ = sweep_inputs()
    group, rates = torch.zeros(P).long(), {"fma": [], "exp": []}
    functions = {
        "rates": lambda: [values.append(cpu_rate(kind)) for kind, values in rates.items()],
        "ours": lambda: ops.logits_lse(base, delta, basis, group=group),
        "torch": lambda: torch.stack([torch.addmm(base, z, basis[0]).logsumexp(-1) for z in delta]),
        "clean": lambda: ops.logits_lse(base, delta[:1, :, :0], basis[:, :0], group=group[:1]),
        "torch, clean": lambda: base.logsumexp(-1),
    }
    times = interleaved(functions, rounds=5)
    logits = float(P * T * V)
    limit = statistics.median(
        seconds / (2 * logits * R / fma + logits / exp)
        for seconds, fma, exp in zip(times["ours"], rates["fma"][1:], rates["exp"][1:], strict=True)
    )
    shape = f"logits_lse fp32, T={T} V={V} r={R} P={P}"
    found(f"{shape}: torch addmm and logsumexp / ours", f"{ratio(times, 'torch', 'ours'):.2f}")
    found(f"{shape}: ours / (FMA time + exp time)", f"{limit:.3f}")
    found(f"clean logits fp32, T={T} V={V}: torch logsumexp / ours", f"{ratio(times, 'torch, clean', 'clean'):.2f}")
