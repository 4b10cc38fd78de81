"""Groups of paths are exact: what each does is what its paths, taken out together, do."""

from itertools import product

import pytest
import torch
from support.deep_models import run_of

import pyfastcircuits as fc


def paths_of(label):
    if isinstance(label, str):
        return fc.enumerate_paths(3, 4, int(label.removeprefix("order ")))
    return [tuple(path) for path in product(*([(step.layer, head) for head in step.heads] for step in label))]


@pytest.mark.parametrize("kind", ["plain", "layernorm", "masked"])
@pytest.mark.parametrize("by", ["order", "layers", "heads"])
def test_groups_are_what_their_paths_do_and_share_out_all(by, kind):
    run = run_of(kind)
    found = fc.path_groups(run, by, budget=24)
    sets = [paths_of(label) for label in found.labels]
    assert sorted(path for paths in sets for path in paths) == sorted(
        path for order in range(4) for path in fc.enumerate_paths(3, 4, order)
    )
    assert found.paths.tolist() == [len(paths) for paths in sets]
    together = fc.path_ablation(run, [[tuple(path) for path in paths] for paths in sets])
    torch.testing.assert_close(found.delta, together.delta, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.values, together.values)
    torch.testing.assert_close(found.baseline, together.baseline)


def test_the_largest_is_refined_first_and_what_is_refined_is_kept():
    run = run_of("plain")
    orders = fc.path_groups(run, "order")
    assert orders.labels == [f"order {k}" for k in range(4)]
    assert orders.refined == {}
    sizes = dict(zip(orders.labels, orders.delta.abs().tolist(), strict=True))
    found = fc.path_groups(run, "heads", budget=7)
    largest = max(("order 1", "order 2", "order 3"), key=sizes.get)  # order 0 is a single path
    assert next(iter(found.refined)) == largest
    by_layers = fc.path_groups(run, "layers", budget=1000)
    for label, (effect, beyond) in by_layers.refined.items():
        assert effect == pytest.approx(float(fc.path_ablation(run, [paths_of(label)]).delta[0]))
        parts = [i for i, part in enumerate(by_layers.labels) if set(paths_of(part)) <= set(paths_of(label))]
        assert beyond == pytest.approx(float(by_layers.delta[parts].sum()) - effect)
    assert len(fc.path_groups(run, "heads", budget=7).labels) <= 4 + 7
    assert len(fc.path_groups(run, "layers", budget=1000).labels) == 8
    assert len(fc.path_groups(run, "heads", budget=1000).labels) == 125


def test_errors_bound_rounding():
    exact, rounded = (fc.path_groups(run_of("huge", dtype=dtype), budget=9) for dtype in (torch.float64, torch.float32))
    by_label = dict(zip(exact.labels, exact.delta.tolist(), strict=True))
    for label, value, error in zip(rounded.labels, rounded.delta.tolist(), rounded.error.tolist(), strict=True):
        if label in by_label:
            assert abs(value - by_label[label]) <= error + 1e-6 * abs(value)
    assert float(exact.error.max()) < 1e-8


def test_labels_in_words():
    found = fc.path_groups(run_of("plain"), "heads", budget=20)
    names = found.table()["label"].to_pylist()
    assert "order 0" in names
    assert any(" -> layer " in name for name in names)
    assert any(name[:2] in ("0.", "1.", "2.") for name in names)


def test_a_capped_model_and_a_negative_budget():
    run = run_of("plain")
    capped = fc.CircuitWeights(*(getattr(run.weights, f"W_{x}") for x in "EQKVOU"), logit_cap=5.0)
    trace = fc.trace(capped, run.tokens)
    found = fc.path_groups(trace, "layers", budget=3)
    together = fc.path_ablation(trace, [paths_of(label) for label in found.labels])
    torch.testing.assert_close(found.delta, together.delta, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="budget is -1"):
        fc.path_groups(run, budget=-1)
