"""What 20 edges of the bundled model can keep of the induction task: the circuit that is found, and how many heads limit it.

An induction head that does the task needs three edges at least: the embedding to its values, a previous-token head to its
keys, and itself to the logits. A previous-token head needs one from the embedding to its values. So 20 edges can serve so
many heads of each layer and no more. Even every edge among such heads keeps only so much of the task. That is no strict
bound, since an edge more may also do harm.
"""

from itertools import combinations, product

import pytest

import pyfastcircuits as fc
from pyfastcircuits.experiments.edited import edited
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.options import measurement
from pyfastcircuits.experiments.outside import Outside

EDGES, AT_ONCE = 20, 32


@pytest.fixture(scope="module")
def task():
    weights = fc.load_weights("induction-2l")
    induction = fc.Task.induction(weights.d_vocab)
    return weights, induction, induction.runs(weights)


def test_the_circuit_that_is_found(task, found):
    _, induction, runs = task
    start = fc.circuit(fc.edge_scores(*runs, "eap-ig", **induction.options), top=3 * EDGES)
    kept = fc.faithfulness(fc.prune_circuit(start, *runs, top=EDGES, **induction.options), *runs, **induction.options)
    name = f"induction-2l, induction, circuit of {EDGES} edges"
    found(f"{name}: right choices / the model's", f"{kept.right[2] / kept.right[0]:.3f}", ">= 0.9")
    found(f"{name}: share of the logit difference (faithfulness)", f"{kept.faithfulness:.3f}", ">= 0.9")


def served(heads):
    """The largest numbers of previous-token and of induction heads that so many edges can serve."""
    pairs = [(m, k) for m, k in product(range(1, heads + 1), repeat=2) if m + 2 * k + max(m, k) <= EDGES]
    return [(m, k) for m, k in pairs if not any((a, b) != (m, k) and a >= m and b >= k for a, b in pairs)]


def test_all_edges_among_as_many_heads(task, found):
    """Every choice of heads, with all edges among them and the embedding."""
    weights, induction, (clean, corrupted) = task
    outside, how = Outside(clean, corrupted, "resample", "all"), measurement(clean, induction.options, "recomputed")
    graph = outside.graph

    def shares(choices):
        there = [{"embed", "logits", *((0, h) for h in first), *((1, h) for h in second)} for first, second in choices]
        wanted = [
            [graph.place(edge) for edge in graph.edges if edge[0] in heads and reader(edge[1]) in heads]
            for heads in there
        ]
        return measure(clean, edited(clean, outside, wanted), how, range(len(wanted))).values

    def reader(receiver):
        return receiver if receiver == "logits" else receiver[0]

    every = range(weights.n_heads)
    nothing, whole = shares([((), ()), (every, every)]).tolist()
    for m, k in served(weights.n_heads):
        choices = list(product(combinations(every, m), combinations(every, k)))
        best = max(float(shares(choices[i : i + AT_ONCE]).max()) for i in range(0, len(choices), AT_ONCE))
        share = (best - nothing) / (whole - nothing)
        found(f"  all edges among the best {m} heads of layer 0 and {k} of layer 1, of {len(choices):,} choices", f"{share:.3f}")  # fmt: skip
