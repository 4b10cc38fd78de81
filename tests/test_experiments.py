"""Every ablation and patching experiment equals the plain rerun with hooks that it replaces."""

import itertools

import pytest
import torch
from support import naive
from support.hooked import Hooked, measures
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.experiments.metrics import METRICS
from pyfastcircuits.run import losses, memory
from pyfastcircuits.run.nodes import Head
from pyfastcircuits.run.paths import path_z

AGAINST = 5
SOME = [(None, "shortformer"), ("layernorm", "rotary"), ("rmsnorm", "standard")]
kinds = pytest.mark.parametrize(("norm", "positional"), SOME)


def model(layers=3, heads=4, **options):
    return random_weights(layers, heads, d=16, r=4, vocabulary=61, **options)


def tokens(batch=3, length=7, seed=0):
    return random_tokens(batch, length, 61, seed)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def nll(clean, run, given):
    return measures(clean.logits, run.logits, given, AGAINST)["nll"].mean()


class Swap:
    """What takes the place of a head's z, written out."""

    def __init__(self, mode, clean, other, over="all"):
        self.mode, self.clean, self.other, self.over = mode, clean, other, over

    def __call__(self, head):
        z = (self.other or self.clean).z[head]
        if self.mode == "zero":
            return torch.zeros_like(self.clean.z[head])
        if self.mode == "resample":
            return z if self.other is not None else z.roll(1, 0)
        dims = {"all": (0, 1), "positions": 1, "batch": 0}[self.over]
        return z.mean(dims, keepdim=True).expand_as(self.clean.z[head])


def heads_out(swap, heads):
    return lambda name, layer, h, x: swap((layer, h)) if name == "z" and (layer, h) in heads else x


MODES = [("zero", False, "all"), ("mean", False, "all"), ("mean", True, "batch"), ("mean", False, "positions"), ("resample", True, "all"), ("resample", False, "all")]  # fmt: skip


@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
@pytest.mark.parametrize(("mode", "with_reference", "over"), MODES)
def test_heads_and_sets_of_heads(attention, mode, with_reference, over):
    norm, positional = SOME[MODES.index((mode, with_reference, over)) % 3]
    w, given, others = model(norm=norm, positional=positional), tokens(), tokens(seed=1)
    clean, other = Hooked(w, given), Hooked(w, others) if with_reference else None
    run = fc.trace(w, given)
    reference = fc.trace(w, others) if with_reference else None
    frozen = clean if attention == "frozen" else None
    scale = clean.scales["final"] if frozen else None
    swap = Swap(mode, clean, other, over)
    options = {"reference": reference, "over": over}
    sets = [[(0, 1)], [(1, 0), (0, 2)], [(1, 1), (1, 3), (2, 0)]]
    found = fc.head_ablation(run, mode, attention, heads=sets, **options)
    for value, heads in zip(found.values, sets, strict=True):
        assert_same(value, nll(clean, Hooked(w, given, heads_out(swap, heads), frozen, scale), given))
    every = fc.head_ablation(run, mode, attention, **options)
    assert every.values.shape == (3, 4)
    for layer, h in ((0, 1), (1, 2), (2, 3)):
        rerun = Hooked(w, given, heads_out(swap, [(layer, h)]), frozen, scale)
        assert_same(every.values[layer, h], nll(clean, rerun, given))
    layers = fc.layer_ablation(run, mode, attention, **options)
    rerun = Hooked(w, given, heads_out(swap, [(1, h) for h in range(4)]), frozen, scale)
    assert_same(layers.values[1], nll(clean, rerun, given))
    assert list(layers.labels) == [0, 1, 2]


@kinds
@pytest.mark.parametrize(("batch", "length"), [(3, 7), (1, 4)], ids=["through W_O @ W_U", "few positions"])
def test_direct_effects(norm, positional, batch, length):
    w, given = model(norm=norm, positional=positional), tokens(batch, length)
    clean, run = Hooked(w, given), fc.trace(w, given)
    for final_norm, scale in (("recomputed", None), ("frozen", clean.scales["final"])):
        found = {
            metric: fc.head_ablation(
                run,
                effect="direct",
                final_norm=final_norm,
                metric=metric,
                against=AGAINST if metric == "logit_difference" else None,
            ).values
            for metric in METRICS
        }
        for layer, h in itertools.product(range(3), range(4)):
            normed, _ = naive.norm(clean.final - clean.z[layer, h] @ w.W_O[layer, h], w, scale)
            expected = measures(clean.logits, normed @ w.W_U + w.b_U, given, AGAINST)
            for metric in METRICS:
                assert_same(found[metric][layer, h], expected[metric].mean())


@pytest.mark.parametrize(("length", "fused"), [(7, True), (3, False)])
def test_direct_effects_store_no_basis(length, fused, monkeypatch):
    """The kernel makes them; few positions need none."""
    given = []

    def spy(*arguments, **options):
        given.append(options.get("outer"))
        return sweep(*arguments, **options)

    sweep = losses.sweep_partial
    monkeypatch.setattr(losses, "sweep_partial", spy)
    fc.head_ablation(fc.trace(model(), tokens(2, length)), effect="direct", backend="cpu")
    assert any(outer is not None for outer in given) == fused


class Hop:
    """The destination reads some inputs without what the source wrote less its replacement; with `direct`, all else
    keeps what it wrote."""

    def __init__(self, w, clean, source, destination, inputs, swap, direct):
        gone = (clean.z[source] - swap(source)) @ w.W_O[source]
        self.w, self.clean, self.gone, self.to = w, clean, gone, destination
        self.inputs, self.direct = inputs, direct

    def __call__(self, name, layer, h, x):
        if name == "z":
            return self.clean.z[layer, h] if self.direct and (layer, h) != self.to else x
        if (layer, h) == self.to:
            base = self.clean.streams[layer]
            return base - self.gone if name in self.inputs else base
        return x


PAIRS = [((0, 0), (1, 3)), ((0, 2), (2, 1)), ((1, 1), (2, 1)), ((1, 3), (2, 2))]


@pytest.mark.parametrize(
    ("mode", "norm", "positional"),
    [(mode, *kind) for mode, kind in zip(("zero", "mean", "resample"), SOME, strict=True)],
)
@pytest.mark.parametrize("scope", ["direct", "edge", "joint"])
@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_pairs(norm, positional, scope, attention, mode):
    w, given = model(norm=norm, positional=positional), tokens()
    clean, run = Hooked(w, given), fc.trace(w, given)
    frozen = clean if attention == "frozen" else None
    scale = clean.scales["final"] if frozen else None
    swap = Swap(mode, clean, None)
    found = fc.pair_ablation(run, scope, mode, attention)
    values = {tuple(map(tuple, pair)): value for pair, value in zip(found.pairs.tolist(), found.values, strict=True)}
    assert len(values) == 3 * 16 + (3 * 6 if scope == "joint" else 0)
    for pair in [*PAIRS, ((1, 0), (1, 2)), ((2, 1), (2, 3))]:
        if scope != "joint" and pair[0][0] == pair[1][0]:
            assert pair not in values
            continue
        hook = heads_out(swap, pair) if scope == "joint" else Hop(w, clean, *pair, "QKV", swap, scope == "direct")
        assert_same(values[pair], nll(clean, Hooked(w, given, hook, frozen, scale), given))


@kinds
@pytest.mark.parametrize("input", ["Q", "K", "V"])
@pytest.mark.parametrize("effect", ["direct", "total"])
def test_composition_ablation(norm, positional, input, effect):
    w, given = model(norm=norm, positional=positional), tokens()
    clean, run = Hooked(w, given), fc.trace(w, given)
    for mode in ("zero", "mean"):
        found = fc.composition_ablation(run, input, mode, effect)
        assert len(found.values) == 3 * 16
        some = fc.composition_ablation(run, input, mode, effect, pairs=PAIRS[::-1])
        for pair, value in zip(PAIRS[::-1], some.values, strict=True):
            hook = Hop(w, clean, *pair, input, Swap(mode, clean, None), effect == "direct")
            assert_same(value, nll(clean, Hooked(w, given, hook), given))
            assert_same(found.values[found.labels.index(pair)], value)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_hops_that_are_cut_together(mode):
    w, given = model(norm="layernorm"), tokens()
    clean, run = Hooked(w, given), fc.trace(w, given)
    swap = Swap(mode, clean, None)
    cut = [((0, 1), (2, 0)), ((1, 2), (2, 0)), ((0, 3), (2, 3)), ((0, 1), (2, 3))]
    found = fc.composition_ablation(run, "K", mode, pairs=[cut, cut[1], [cut[1]]])

    def hook(name, layer, h, x):
        gone = [(clean.z[s] - swap(s)) @ w.W_O[s] for s, to in cut if to == (layer, h)]
        return clean.streams[layer] - sum(gone) if name == "K" and gone else x

    assert_same(found.values[0], nll(clean, Hooked(w, given, hook), given))
    assert_same(found.values[1], found.values[2])
    assert found.labels == [frozenset(cut), cut[1], frozenset([cut[1]])]
    assert found.table()["label"].to_pylist()[1:] == ["1.2 -> 2.0", "{1.2 -> 2.0}"]


@kinds
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_patching(norm, positional, direction):
    w, given, others = model(norm=norm, positional=positional), tokens(), tokens(seed=1)
    clean, corrupted = Hooked(w, given), Hooked(w, others)
    runs = fc.trace(w, given), fc.trace(w, others)
    into, source, own = (clean, corrupted, given) if direction == "noise" else (corrupted, clean, others)
    swap = Swap("resample", into, source)
    found = fc.activation_patching(*runs, direction=direction)
    for layer, h in ((0, 1), (1, 2), (2, 3)):
        rerun = Hooked(w, own, heads_out(swap, [(layer, h)]))
        assert_same(found.values[layer, h], nll(clean, rerun, given))
    assert_same(found.baseline, nll(clean, into, given))
    assert float(found.setup["clean"]) == pytest.approx(float(nll(clean, clean, given)))
    assert float(found.setup["corrupted"]) == pytest.approx(float(nll(clean, corrupted, given)))
    for effect, input in (("direct", "K"), ("total", "Q")):
        found = fc.path_patching(*runs, input, effect, direction=direction, pairs=PAIRS)
        for pair, value in zip(PAIRS, found.values, strict=True):
            hook = Hop(w, into, *pair, input, swap, effect == "direct")
            assert_same(value, nll(clean, Hooked(w, own, hook), given))


@pytest.mark.parametrize("input", ["Q", "K", "V"])
@pytest.mark.parametrize("effect", ["direct", "total"])
@pytest.mark.parametrize("metric", ["nll", "logit_difference", "probability"])
def test_edge_attribution_is_the_first_order(input, effect, metric):
    """As the corrupted run nears the clean one, its error falls faster than the change itself."""
    errors = []
    for share in (1e-2, 1e-3):
        w = model(norm="layernorm")
        W_E = w.W_E.clone()
        W_E[30:60] = W_E[:30] + share * (W_E[30:60] - W_E[:30])  # token t + 30 is nearly token t
        w = fc.CircuitWeights(W_E, w.W_Q, w.W_K, w.W_V, w.W_O, w.W_U, w.W_pos, positional="shortformer", norm="layernorm", b_U=w.b_U)  # fmt: skip
        given = tokens() % 30
        runs = fc.trace(w, given), fc.trace(w, given + 30)
        how = {"against": AGAINST} if metric == "logit_difference" else {}
        found = fc.edge_attribution(*runs, input, effect, exact=48, metric=metric, **how)
        true = found.extra["exact"] - found.baseline
        assert_same(found.extra["exact"], fc.path_patching(*runs, input, effect, metric=metric, **how).values)
        errors.append(float((found.delta - true).norm() / true.norm()))
    assert errors[1] < 0.2 * errors[0] < 0.02


def test_edge_attribution_checks_the_best_exactly():
    w = model()
    runs = fc.trace(w, tokens()), fc.trace(w, tokens(seed=1))
    found = fc.edge_attribution(*runs, "K", exact=5)
    known = found.extra["exact"].isfinite()
    assert int(known.sum()) == 5
    assert {label for label, _ in found.top(5)} == {found.labels[i] for i in known.nonzero().flatten().tolist()}
    exact = fc.path_patching(*runs, "K")
    assert_same(found.extra["exact"][known], exact.values[known])
    assert_same(found.extra["error"][known], (found.values - exact.values)[known])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", [None, "layernorm"])
def test_metrics_and_positions(metric, norm):
    w, given = model(norm=norm, positional="standard"), tokens()
    clean, run = Hooked(w, given), fc.trace(w, given)
    against = torch.full((3,), AGAINST)
    how = {"metric": metric, "kl": True, **({"against": against} if metric == "logit_difference" else {})}
    chosen = torch.zeros(7, dtype=torch.bool)
    chosen[[1, 4]] = True
    for attention, frozen in (("frozen", clean), ("recomputed", None)):
        scale = clean.scales["final"] if frozen else None
        for place in (None, [1, -3], chosen):
            found = fc.head_ablation(run, "zero", attention, positions=place, **how)
            each = fc.head_ablation(run, "zero", attention, positions=place, per_token=True, **how)
            rows = slice(None) if place is None else [1, 4]
            for layer, h in ((0, 1), (2, 3)):
                rerun = Hooked(w, given, heads_out(Swap("zero", clean, None), [(layer, h)]), frozen, scale)
                true = measures(clean.logits, rerun.logits, given, AGAINST)
                for name, values, singly in ((metric, found.values, each.values), ("kl", found.kl, each.kl)):
                    assert_same(values[layer, h], true[name][:, rows].mean())
                    assert_same(singly[layer, h][:, rows], true[name][:, rows])
            assert each.values.shape == (3, 4, 3, 6)
            base = measures(clean.logits, clean.logits, given, AGAINST)[metric]
            assert_same(found.baseline, base[:, rows].mean())
            assert int(each.values[0, 0].isfinite().sum()) == 3 * (6 if place is None else 2)
    # changes of rank r, and of several paths with the bias, with the final norm frozen and not
    for final_norm in ("frozen", "recomputed"):
        paths = [(), ((0, 1), (2, 2)), [(), ((1, 0),)]]
        found = fc.path_ablation(run, paths, final_norm=final_norm, **how)
        for value, entry in zip(found.values, paths, strict=True):
            several = entry if isinstance(entry, list) else [entry]
            stream = clean.final
            for path in several:
                stream = stream - written(run, path)
            scale = clean.scales["final"] if final_norm == "frozen" else None
            normed, _ = naive.norm(stream, w, scale)
            logits = normed @ w.W_U + (0 if () in several else w.b_U)
            assert_same(value, measures(clean.logits, logits, given, AGAINST)[metric].mean())


def written(run, path):
    """What a path writes to the final residual stream."""
    if not path:
        return run.non_head_stream(run.weights.n_layers)
    return path_z(run, [tuple(Head(*head) for head in path)])[0] @ run.weights.head("W_O", *path[-1])


def test_the_last_position_with_given_targets():
    w, given = model(norm="layernorm"), tokens()
    clean, run = Hooked(w, given), fc.trace(w, given)
    right, wrong = torch.tensor([3, 4, 5]), torch.tensor([7, 8, 9])
    found = fc.head_ablation(run, metric="logit_difference", targets=right, against=wrong, positions=-1)
    rerun = Hooked(w, given, heads_out(Swap("zero", clean, None), [(1, 2)]), clean, clean.scales["final"])
    last, row = rerun.logits[:, -1], torch.arange(3)
    assert_same(found.values[1, 2], (last[row, right] - last[row, wrong]).mean())
    kl = fc.head_ablation(run, metric="kl", positions=6)
    p, q = clean.logits[:, -1].log_softmax(-1), last.log_softmax(-1)
    assert_same(kl.values[1, 2], (p.exp() * (p - q)).sum(-1).mean())
    assert float(kl.baseline) == 0
    each = fc.head_ablation(run, metric="kl", positions=6, per_token=True)
    assert each.values.shape == (3, 4, 3, 7)


def test_masks():
    w, given = model(norm="rmsnorm", positional="none"), tokens()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    run = fc.trace(w, given, mask)
    for attention in ("frozen", "recomputed"):
        found = fc.head_ablation(run, "mean", attention, over="batch", per_token=True)
        alone = fc.trace(w, given[1:2, :4])
        for layer, h in ((0, 1), (2, 3)):
            z = [fc.trace(w, given[b : b + 1, :n]).z(layer)[h, 0] for b, n in ((0, 7), (1, 4), (2, 7))]
            means = torch.stack([torch.stack([x[t] for x in z if t < len(x)]).mean(0) for t in range(4)])

            def mean(name, at, head, x, place=(layer, h), means=means):
                return means.expand_as(x) if name == "z" and (at, head) == place else x

            clean = Hooked(w, given[1:2, :4])
            rerun = Hooked(w, given[1:2, :4], mean, clean if attention == "frozen" else None, clean.scales["final"] if attention == "frozen" else None)  # fmt: skip
            assert_same(
                found.values[layer, h, 1, :3], measures(clean.logits, rerun.logits, given[1:2, :4], AGAINST)["nll"][0]
            )
            assert found.values[layer, h, 1, 3:].isnan().all()
        assert_same(alone.loss, found.baseline[1, :3].mean())


def test_cutting_changes_nothing(monkeypatch):
    w, given, others = model(norm="layernorm"), tokens(5), tokens(5, seed=1)
    run, other = fc.trace(w, given), fc.trace(w, others)
    calls = {
        "heads": lambda: fc.head_ablation(run, "mean", "recomputed", over="positions", kl=True),
        "resampled": lambda: fc.head_ablation(run, "resample", kl=True, final_norm="recomputed"),
        "rank": lambda: fc.head_ablation(run, metric="rank", low_memory=True),
        "joint": lambda: fc.pair_ablation(run, "joint", "mean", kl=True, low_memory=True),
        "edge": lambda: fc.pair_ablation(run, "edge", "resample", reference=other),
        "hops": lambda: fc.path_patching(run, other, "K", "direct"),
        "total": lambda: fc.path_patching(run, other, "V", "total"),
        "paths": lambda: fc.path_ablation(run, fc.enumerate_paths(3, 4, 2), "mean", over="batch", per_token=True),
        "first order": lambda: fc.edge_attribution(run, other, "Q"),
    }
    whole = {name: call() for name, call in calls.items()}
    for name, value in (("BLOCK_BYTES", 1 << 12), ("CLEAN_LOGITS_BYTES", 1 << 15), ("ROWS", 8)):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr("pyfastcircuits.experiments.edges.SCORES", 1 << 10)
    for name, call in calls.items():
        cut = call()
        torch.testing.assert_close(cut.values, whole[name].values, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert_same(cut.baseline, whole[name].baseline)
        for also in cut.extra:
            assert_same(cut.extra[also], whole[name].extra[also])


@pytest.mark.parametrize(("norm", "positional"), KINDS)
def test_every_kind_of_model(norm, positional):
    w, given = model(2, norm=norm, positional=positional), tokens()
    clean, run = Hooked(w, given), fc.trace(w, given)
    torch.testing.assert_close(clean.logits, run.logits())
    stream = run.embedded[None]
    for layer in range(2):
        stream = run.forward.block(layer, stream)
        torch.testing.assert_close(stream[0], run.streams[layer + 1])
    found = fc.head_ablation(run, "zero", "recomputed")
    rerun = Hooked(w, given, heads_out(Swap("zero", clean, None), [(0, 1)]))
    assert_same(found.values[0, 1], nll(clean, rerun, given))


@pytest.mark.parametrize("store", ["patterns", "qk"])
def test_queries_and_keys_will_do(store):
    w, given = model(norm="layernorm"), tokens()
    run, qk = fc.trace(w, given), fc.trace(w, given, store="qk")
    for call in (
        lambda run: fc.pair_ablation(run, "joint", kl=True),
        lambda run: fc.pair_ablation(run, "edge", "mean"),
        lambda run: fc.composition_ablation(run, "K"),
    ):
        assert_same(call(qk).values, call(run).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_against_fp64(dtype):
    w, given = model(norm="layernorm", dtype=dtype), tokens()
    run, exact = fc.trace(w, given), fc.trace(w.to(torch.float64), given)
    for call in (
        lambda run: fc.head_ablation(run, "mean", "recomputed"),
        lambda run: fc.pair_ablation(run, "joint"),
        lambda run: fc.composition_ablation(run, "Q", effect="direct"),
    ):
        ours, truth = call(run), call(exact)
        assert ours.values.dtype == torch.float32
        torch.testing.assert_close(ours.values.double(), truth.values, rtol=2e-5, atol=2e-5)


def test_tables_and_top():
    run = fc.trace(model(), tokens())
    heads = fc.head_ablation(run, kl=True)
    table = heads.table()
    assert table.column_names == ["layer", "head", "nll", "delta_nll", "kl"]
    assert table.schema.metadata[b"mode"] == b"zero"
    assert table["delta_nll"].to_pylist() == heads.delta.flatten().tolist()
    pairs = fc.pair_ablation(run, "edge", metric="probability", per_token=True, positions=[2, 3])
    table = pairs.table()
    names = ["source_layer", "source_head", "dest_layer", "dest_head", "sequence", "position"]
    assert table.column_names == [*names, "probability", "delta_probability"]
    assert len(table) == 48 * 3 * 2
    row = table.slice(7, 1).to_pylist()[0]
    index = pairs.labels.index(((row["source_layer"], row["source_head"]), (row["dest_layer"], row["dest_head"])))
    assert row["probability"] == float(pairs.values[index, row["sequence"], row["position"]])
    falls = [delta for _, delta in pairs.top(4)]
    assert falls == sorted(falls)
    sets = fc.head_ablation(run, heads=[[(0, 1), (1, 2)], [(2, 2)]])
    assert sets.table()["label"].to_pylist() == ["{0.1, 1.2}", "2.2"]
    assert "nll of 12, mode=zero, attention=frozen" in repr(heads)
    assert fc.layer_ablation(run).table().column_names[0] == "layer"
    with pytest.raises(AttributeError, match="'kl' was not measured, only nll"):
        _ = sets.kl


BAD = {
    "mode": (lambda r: fc.pair_ablation(r, "edge", "noise"), "mode is 'noise', expected one of zero, mean, resample"),
    "over": (lambda r: fc.head_ablation(r, "mean", over="heads"), "over is 'heads', expected one of all, positions, batch"),
    "metric": (lambda r: fc.head_ablation(r, metric="loss"), "metric is 'loss', expected one of nll, kl, logit_difference"),
    "scope": (lambda r: fc.pair_ablation(r, "paths"), "scope is 'paths', expected one of path, direct, edge, joint"),
    "attention": (lambda r: fc.head_ablation(r, attention="anew"), "attention is 'anew', expected one of frozen, recomp"),
    "path": (lambda r: fc.pair_ablation(r, "path", attention="recomputed"), "attention is 'recomputed', but scope is 'path'"),
    "input": (lambda r: fc.composition_ablation(r, "O"), "kind is 'O', expected one of Q, K, V"),
    "effect": (lambda r: fc.composition_ablation(r, "Q", effect="some"), "effect is 'some', expected one of total, direct"),
    "norm": (lambda r: fc.head_ablation(r, final_norm="x"), "final_norm is 'x', expected one of frozen, recomputed"),
    "against": (lambda r: fc.head_ablation(r, metric="logit_difference"), "against is missing, but metric is"),
    "against too": (lambda r: fc.head_ablation(r, against=3), "against is given, but metric is 'nll'"),
    "last": (lambda r: fc.head_ablation(r, positions=6), "positions holds the last one, 6, which has no next token"),
    "mask": (lambda r: fc.head_ablation(r, positions=torch.ones(5).bool()), r"positions has shape \[5\], expected \[7\]"),
    "none": (lambda r: fc.head_ablation(r, positions=torch.zeros(7).bool()), "nothing is left to measure"),
    "targets": (lambda r: fc.head_ablation(r, targets=torch.zeros(4).long()), r"targets has shape \[4\], expected \[3\]"),
    "zero": (lambda r: fc.head_ablation(r, reference=r), "reference is given, but mode is 'zero'"),
    "shape": (lambda r: fc.head_ablation(r, "resample", reference=fc.trace(r.weights, tokens(2))), r"reference has tokens of shape \[2, 7\], but the run \[3, 7\]"),
    "means": (lambda r: fc.head_ablation(r, "mean", over="batch", reference=fc.trace(r.weights, tokens(3, 6))), r"reference has tokens of shape \[3, 6\]"),
    "model": (lambda r: fc.head_ablation(r, "mean", reference=fc.trace(model(2), tokens())), "reference is a run of another model"),
    "weights": (lambda r: fc.path_patching(r, fc.trace(model(seed=1), tokens()), "Q"), "corrupted is a run of another model: its W_E differs"),
    "patching": (lambda r: fc.activation_patching(r, fc.trace(r.weights, tokens(3, 6))), r"corrupted has tokens of shape \[3, 6\], but clean \[3, 7\]"),
    "direction": (lambda r: fc.activation_patching(r, r, direction="up"), "direction is 'up', expected one of denoise, noise"),
    "alone": (lambda r: fc.head_ablation(r[:1], "resample"), "mode is 'resample', but the run has one sequence"),
    "gradient": (lambda r: fc.edge_attribution(r, r, "Q", metric="rank"), "metric is 'rank', kl False, per_token False, per_sequence False: expected the mean"),
    "exact": (lambda r: fc.edge_attribution(r, r, "Q", exact=-1), "exact is -1"),
    "pairs": (lambda r: fc.composition_ablation(r, "Q", pairs=[((0, 1),)]), "pairs holds"),
    "cut": (lambda r: fc.composition_ablation(r, "Q", pairs=[[((0, 1), (1, 1)), ((0, 1), (2, 1))]]), "pairs that are cut together need one layer"),
    "cut, direct": (lambda r: fc.composition_ablation(r, "Q", effect="direct", pairs=[[((0, 1), (1, 1))]]), "and effect 'total'"),
    "several": (lambda r: fc.head_ablation(r, effect="direct", heads=[[(0, 1), (1, 1)]]), "heads holds a set of several"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        call(fc.trace(model(), tokens()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: fc.head_ablation(r, positions=[0, 9]), IndexError, "positions holds 9, but sequences have 7 tokens"),
        (lambda r: fc.head_ablation(r, targets=61), IndexError, "targets"),
        (lambda r: fc.head_ablation(r, heads=[(3, 0)]), IndexError, "head is 3.0"),
        (lambda r: fc.head_ablation(r, targets=0.5), TypeError, "targets is 0.5, expected a tensor or an integer"),
        (lambda r: fc.path_patching(r, 3, "Q"), TypeError, "corrupted is 3, expected FrozenTrace"),
        (lambda r: fc.activation_patching("x", r), TypeError, "clean is 'x', expected FrozenTrace"),
        (lambda r: fc.head_ablation(r, metrics="nll"), TypeError, "unexpected keyword argument 'metrics'"),
    ],
    ids=["position", "token", "head", "dtype", "run", "clean", "keyword"],
)
def test_what_is_out_of_range_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(fc.trace(model(), tokens()))
