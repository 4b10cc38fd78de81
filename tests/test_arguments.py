"""Every public function checks its arguments on the way in, by its own annotations, and says what came."""

import inspect
import pkgutil
import warnings

import numpy as np
import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits import ops
from pyfastcircuits.arguments import describe, public

WEIGHTS, TOKENS = random_weights(), random_tokens()
RUN = fc.trace(WEIGHTS, TOKENS)
MATRIX = fc.ov_circuit(WEIGHTS, (0, 1))
PUBLIC = {name: value for name in fc.__all__ if inspect.isfunction(value := getattr(fc, name))}
TYPED_OPS = {name: value for name in ops.__all__ if inspect.isfunction(value := getattr(ops, name))}
NO_ARGUMENT = {"build_info", "check_range", "resolve_backend"}


class Anything:
    """Not of any type that a function asks for."""


def test_no_public_function_hides_a_module():
    """`import pyfastcircuits.name` and `fc.name` are one thing, or one of them is not there."""
    modules = {module.name for module in pkgutil.iter_modules(fc.__path__)}
    assert not modules & PUBLIC.keys()
    assert "plot" in modules


@pytest.mark.parametrize("name", [n for n in (*PUBLIC, *TYPED_OPS) if n not in NO_ARGUMENT])
def test_each_argument_of_another_type_is_named(name):
    """One argument at a time; all others are left out, which is noticed later."""
    function = (PUBLIC | TYPED_OPS)[name]
    for parameter in inspect.signature(function).parameters.values():
        free = parameter.annotation is parameter.empty or "Any" in str(parameter.annotation)
        if free or isinstance(parameter.annotation, str) or "Sequence[int]" in str(parameter.annotation):
            continue
        with pytest.raises(TypeError, match=rf"^{parameter.name} is an Anything, expected "):
            function(**{parameter.name: Anything()})


@pytest.mark.parametrize("name", [n for n in (*PUBLIC, *TYPED_OPS) if n not in NO_ARGUMENT])
def test_an_unknown_keyword_names_the_public_function(name):
    function = (PUBLIC | TYPED_OPS)[name]
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'colour'"):
        function(*[None] * 0, colour=3)


def _quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)


TENSORS = {
    "None": None,
    "list": [[1.0]],
    "numpy": np.ones((2, 2)),
    "sparse": torch.eye(3).to_sparse(),
    "quantised": _quantised(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_no_dense_tensor_is_refused(kind):
    value = TENSORS[kind]
    for call in (
        lambda: fc.trace(WEIGHTS, value),
        lambda: fc.positivity(value),
        lambda: fc.project(RUN, value),
        lambda: ops.factored_topk(value, torch.eye(3), 1),
        lambda: ops.sweep_nll(value, value, value, value),
    ):
        with pytest.raises((TypeError, ValueError), match=r" is (None|an? [\w ]+).*, expected a (dense )?tensor"):
            call()


HALVES = {
    "head": lambda x: fc.qk_circuit(WEIGHTS, (0, x)),
    "layer": lambda x: RUN.pattern(x),
    "pair": lambda x: fc.pair_ablation(RUN, pairs=[((0, x), (1, 0))]),
    "path": lambda x: fc.path_logits(RUN, [(0, x)]),
    "several paths": lambda x: fc.path_ablation(RUN, [[((0, x),), ((0, 1), (1, 0))]]),
    "heads": lambda x: fc.head_ablation(RUN, heads=[(0, x)]),
    "sources": lambda x: fc.composition_scores(WEIGHTS, "K", sources=[(0, x)]),
    "k": lambda x: fc.top_entries(MATRIX, x),
    "factored rows": lambda x: MATRIX[x],
    "factored columns": lambda x: MATRIX[:, x],
    "rows": lambda x: fc.top_per_row(MATRIX, 1, [x]),
    "rank": lambda x: fc.subspaces(WEIGHTS, (0, 0), (1, 0), rank=x),
    "order": lambda x: fc.order_losses(RUN, x),
    "positions": lambda x: fc.head_ablation(RUN, positions=[x]),
    "targets": lambda x: fc.head_ablation(RUN, targets=x),
    "token": lambda x: fc.skip_trigrams(WEIGHTS, (0, 0), [x]),
    "offset": lambda x: fc.qk_circuit(random_weights(positional="rotary"), (0, 1), offset=x),
    "count": lambda x: fc.count_paths(x, 2),
    "seed": lambda x: fc.head_scores(WEIGHTS, length=4, seed=x),
    "window": lambda x: ops.attention_lse(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), window=x),
}


@pytest.mark.parametrize(
    "index", [torch.tensor(0.5), 0.5, 1.5, float("nan"), True, np.bool_(True), "1", 1j, torch.tensor(True)], ids=str
)
@pytest.mark.parametrize("place", HALVES)
def test_what_is_no_integer_is_no_index(place, index):
    if place == "positions" and isinstance(index, (bool, np.bool_, torch.Tensor)):
        return  # a mask
    with pytest.raises((TypeError, ValueError), match=r" (is|has|holds) .*(expected|needs|one of)"):
        HALVES[place](index)


@pytest.mark.parametrize("place", [p for p in HALVES if p not in ("rows", "positions", "targets", "token")])
def test_what_counts_as_an_integer_is_one(place):
    for one in (np.int64(1), np.uint8(1), torch.tensor(1)):
        HALVES[place](one)


NUMBERS = {
    "cap": lambda x: ops.sweep_nll(*sweep_inputs(), cap=x),
    "joint cap": lambda x: ops.joint_nll(*sweep_inputs(), torch.zeros(1, 2).long(), cap=x),
    "softcap": lambda x: ops.attention_lse(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), softcap=x),
    "scale": lambda x: ops.attention_lse(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), scale=x),
    "attention_scale": lambda x: random_weights_with(attention_scale=x),
    "logit_cap": lambda x: random_weights_with(logit_cap=x),
    "rotary_base": lambda x: random_weights_with(rotary_base=x),
}


def sweep_inputs():
    return torch.ones(3, 12), torch.ones(2, 3, 4), torch.ones(1, 4, 12), torch.tensor([1, 5, 11])


def random_weights_with(**options):
    weights = random_weights(positional="rotary")
    return fc.CircuitWeights(
        *(getattr(weights, f"W_{name}") for name in "EQKVOU"), positional="rotary", rotary_dim=4, **options
    )


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf"), -float("inf"), "3", 1j, True], ids=str)
@pytest.mark.parametrize("place", NUMBERS)
def test_what_is_no_positive_number_is_refused(place, number):
    with pytest.raises((TypeError, ValueError), match=rf"{place.split()[-1]} is .*, expected"):
        NUMBERS[place](number)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "3", 1j], ids=str)
@pytest.mark.parametrize("option", ["embed_scale", "eps"])
def test_options_of_weights_are_finite_numbers(option, number):
    with pytest.raises((TypeError, ValueError), match=f"{option} is .*, expected a (finite )?number"):
        random_weights_with(**{option: number})


def test_scales_of_a_sweep_are_positive():
    base, delta, basis, targets = sweep_inputs()
    with pytest.raises(TypeError, match=r"scale has dtype torch\.complex64, expected floating point"):
        ops.sweep_nll(base, delta, basis, targets, scale=torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"group has dtype torch\.complex64, expected integers"):
        ops.sweep_nll(base, delta, basis, targets, group=torch.ones(2, dtype=torch.complex64))
    for wrong in (-1.0, 0.0, float("nan"), float("inf")):
        scale = torch.ones(2, 3)
        scale[1, 2] = wrong
        with pytest.raises(ValueError, match=rf"scale\[1, 2\] is {wrong}, expected a positive number"):
            ops.sweep_nll(base, delta, basis, targets, scale=scale)


def test_values_are_described_on_one_line():
    for value in (None, 3, 2.5, True, "x" * 500, "a\nb\x1b[31m", b"x", 1j, torch.eye(3), [1], {}, Anything(), Anything):
        text = describe(value)
        assert len(text) <= 120
        assert text.isprintable()


def test_methods_and_defaults_pass():
    @public
    def function(a: int, b: float = 2.0, *, c: str | None = None) -> tuple:
        """Nothing."""
        return a, b, c

    assert function(np.int32(3), 1) == (3, 1.0, None)
    assert function(a=3, c="x") == (3, 2.0, "x")
    with pytest.raises(TypeError, match=r"function\(\) missing 1 required positional argument: 'a'"):
        function()
    with pytest.raises(TypeError, match=r"function\(\) takes from 1 to 2 positional arguments but 3 were given"):
        function(1, 2.0, 3)
