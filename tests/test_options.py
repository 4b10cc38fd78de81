"""Options of measurements and metric objects: declared once, shown by help, refused in the experiment's own name."""

import inspect

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.experiments.metrics import METRICS
from pyfastcircuits.experiments.options import DEFAULTS, MeasureOptions

EXPERIMENTS = (
    fc.path_ablation, fc.pair_ablation, fc.head_ablation, fc.layer_ablation, fc.composition_ablation, fc.path_patching,
    fc.activation_patching, fc.edge_attribution, fc.logit_lens, fc.sweep,
)  # fmt: skip
EXPERIMENT = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def run():
    return fc.trace(random_weights(2, norm="layernorm"), random_tokens(3))


def test_options_and_their_defaults_are_the_same_names():
    assert MeasureOptions.__annotations__.keys() == DEFAULTS.keys()


@EXPERIMENT
def test_help_shows_every_option(experiment):
    shown = inspect.signature(experiment).parameters
    text = inspect.getdoc(experiment)
    for name, default in DEFAULTS.items():
        assert shown[name].default == default
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f" {name}" in text
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in shown.values())
    assert text.index("Args:") < text.index(' metric: "nll"') < text.index("Returns:")


@EXPERIMENT
def test_another_keyword_is_refused_in_the_name_of_the_function(experiment, run):
    with pytest.raises(TypeError, match=rf"^{experiment.__name__}\(\) got an unexpected keyword argument 'metrics'$"):
        experiment(run, metrics="nll")


def test_siblings_agree_on_their_defaults():
    for name, siblings in {
        "effect": (fc.head_ablation, fc.composition_ablation, fc.path_patching, fc.edge_attribution),
        "direction": (fc.activation_patching, fc.path_patching, fc.edge_attribution),
        "mode": (fc.path_ablation, fc.pair_ablation, fc.head_ablation, fc.layer_ablation, fc.composition_ablation),
        "attention": (fc.pair_ablation, fc.head_ablation, fc.layer_ablation, fc.sweep),
        "final_norm": EXPERIMENTS,
    }.items():
        assert len({inspect.signature(function).parameters[name].default for function in siblings}) == 1


def test_the_final_norm_goes_with_the_attention(run):
    frozen, recomputed = ({"final_norm": x} for x in ("frozen", "recomputed"))
    for call, same, other in (
        (lambda **o: fc.head_ablation(run, **o), frozen, recomputed),
        (lambda **o: fc.head_ablation(run, attention="recomputed", **o), recomputed, frozen),
        (lambda **o: fc.path_ablation(run, [((0, 1),)], **o), frozen, recomputed),
        (lambda **o: fc.composition_ablation(run, "K", effect="direct", **o), recomputed, frozen),
        (lambda **o: fc.activation_patching(run, run[torch.tensor([1, 2, 0])], **o), recomputed, frozen),
        (lambda **o: fc.logit_lens(run, **o), recomputed, frozen),
    ):
        assert torch.equal(call().values, call(**same).values)
        assert not torch.allclose(call().values, call(**other).values, rtol=1e-9, atol=1e-12)


OBJECTS = {
    "nll": (fc.NLL, {}),
    "kl": (fc.KL, {}),
    "logit_difference": (fc.LogitDifference, {"against": 7}),
    "probability": (fc.Probability, {}),
    "rank": (fc.Rank, {}),
    "top1": (fc.Top1, {}),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("targets", [None, 4, torch.tensor([4, 5, 6])])
def test_a_metric_object_is_its_name_with_tokens(name, targets, run):
    spec, more = OBJECTS[name]
    by_name = fc.head_ablation(run, metric=name, targets=targets, **more)
    by_object = fc.head_ablation(run, metric=spec(targets, **more))
    assert torch.equal(by_name.values, by_object.values)
    assert torch.equal(by_name.baseline, by_object.baseline)
    assert (by_name.metric, by_name.harm) == (by_object.metric, by_object.harm) == (name, spec.harm)
    assert torch.equal(getattr(by_object, name), by_object.values)


def test_a_logit_difference_of_two_tokens_reads_as_it_is_said(run):
    found = fc.head_ablation(run, metric=fc.LogitDifference(3, 4), positions=-1)
    logits = run.logits()[:, -1]
    torch.testing.assert_close(found.baseline, (logits[:, 3] - logits[:, 4]).mean())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": fc.LogitDifference(3)}, ValueError, "against is missing, but metric is LogitDifference"),
        ({"metric": fc.NLL(3), "targets": 3}, ValueError, r"metric is NLL\(...\), which holds its tokens"),
        ({"metric": "loss"}, ValueError, "metric is 'loss', expected one of nll, kl, logit_difference, probability"),
        ({"metric": fc.NLL}, TypeError, "metric is the class NLL, expected one of nll, .* or MetricSpec"),
        ({"metric": fc.NLL(97)}, IndexError, "targets is 97, expected 0 to 96"),
    ],
)
def test_bad_metrics_are_named(options, error, message, run):
    with pytest.raises(error, match=message):
        fc.head_ablation(run, **options)
