"""Figures: every value in its place, texts that fit, sizes for models of any depth, blank where there is no pair."""

import io
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from support.pictures import cut_off, drawn, overlapping, pixel, texts
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.drawing import labelled, marks, matrix, page, patterns
from pyfastcircuits.result import label_name

WEIGHTS = random_weights(3)
TRACE = fc.trace(WEIGHTS, random_tokens(2, 9))
PAIRS = fc.pair_ablation(TRACE, kl=True)
HEADS = fc.head_ablation(TRACE, per_token=True)
SCORES = fc.head_scores(WEIGHTS, length=6, batch=2, batches=1)
HOSTILE = ["$x_1$", "\x1b[31m", "<script>", "日本", " \n", "", "a" * 90, "{\\frac", " tab\t", "^_"]


def random_pairs(layers, heads):
    generator = torch.Generator().manual_seed(layers)
    return torch.randn(layers, heads, layers, heads, generator=generator) ** 3


def figures():
    """A figure of each kind."""
    yield "pairs", lambda: PAIRS.plot()
    yield "heads", lambda: fc.head_ablation(TRACE).plot()
    yield "positions", lambda: HEADS.plot(tokens=HOSTILE[:9])
    yield "layers", lambda: fc.logit_lens(TRACE).plot()
    yield "bars", lambda: fc.direct_logit_attribution(TRACE).plot()
    yield "terms", lambda: fc.qk_terms(TRACE, (2, 1)).plot()
    yield "shares", lambda: fc.qk_terms(TRACE, (2, 1), "head", per_token=False).plot()
    yield "few pairs", lambda: fc.induction_heads(WEIGHTS, SCORES).plot()
    yield "scores", lambda: fc.plot.head_scores(SCORES)
    yield "scatter", lambda: fc.plot.scatter(SCORES, "previous_token", "induction")
    yield "orders", lambda: fc.plot.orders(fc.sweep(WEIGHTS, TRACE.tokens, "head"))
    yield "marginals", lambda: fc.plot.marginals(fc.layer_marginals(TRACE))
    yield "composition", lambda: fc.plot.composition(WEIGHTS, "V", raw=True)
    yield "eigenvalues", lambda: fc.plot.eigenvalues(WEIGHTS, "QK")
    yield "attention", lambda: fc.plot.attention(TRACE, (1, 2), tokens=HOSTILE[:9])
    yield "patterns", lambda: fc.plot.patterns(TRACE, sequence=1, layers=[0, 2])
    yield "skip-trigrams", lambda: fc.plot.skip_trigrams(fc.skip_trigrams(WEIGHTS, (0, 1), k=4, text=lambda x: "$_"))
    yield "subspaces", lambda: fc.subspaces(TRACE, (0, 1), (2, 1)).plot()
    yield "components", lambda: fc.component_scores(WEIGHTS, "Q", (0, 1), (2, 1)).plot()
    yield "virtual head", lambda: fc.virtual_head(TRACE, (0, 1), (2, 1)).plot()


@pytest.mark.parametrize("draw", [x for _, x in figures()], ids=[name for name, _ in figures()])
def test_texts_fit(draw):
    """None is cut off, none covers another, and no figure needs more than a page or two screens."""
    figure = draw()
    assert cut_off(figure) == []
    assert overlapping(figure) == []
    width, height = figure.get_size_inches()
    assert 4 <= width <= 8.5
    assert 1 <= height <= 9.5
    assert "pyplot" not in vars(matplotlib) or not matplotlib.pyplot.get_fignums()


@pytest.mark.parametrize(("layers", "heads"), [(2, 1), (2, 3), (3, 40), (12, 12), (32, 32)])
def test_pairs_of_models_of_any_size(layers, heads):
    values = random_pairs(layers, heads)
    figure = fc.plot.pairs(values, title=f"{layers} layers of {heads} heads", scale="change of the loss (millinats)")
    assert cut_off(figure) == []
    assert overlapping(figure) == []
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    height, width = _size(file)
    assert 800 <= width <= 1700
    assert 300 <= height <= 1800
    shown = figure.axes[0].images[0].get_array().data
    assert np.nanmax(np.abs(shown)) == pytest.approx(float(_there(values).abs().max()))  # the strongest is seen
    a, b, c, d = (int(x) for x in np.unravel_index(int(_there(values).abs().argmax()), values.shape))
    assert any(text.startswith(f"Largest: {a}.{b} -> {c}.{d}") for text, _ in texts(figure))


def _size(file):
    from PIL import Image

    width, height = Image.open(file).size
    return height, width


def _there(values):
    layer = torch.arange(len(values))
    return values * (layer[:, None] < layer)[:, None, :, None]


def test_every_pair_is_in_its_place():
    shown = PAIRS.plot().axes[0].images[0].get_array().data
    heads, factor = WEIGHTS.n_heads, None
    for (source, destination), value in zip(PAIRS.labels, PAIRS.delta.tolist(), strict=True):
        cell = shown[source[0] * heads + source[1], (destination[0] - 1) * heads + destination[1]]
        factor = factor or cell / value
        assert cell == pytest.approx(factor * value)
    assert factor == pytest.approx(10 ** round(np.log10(factor)))
    assert np.isfinite(shown).sum() == len(PAIRS.labels)
    ticks = [x.get_text() for x in PAIRS.plot().axes[0].get_yticklabels()]
    assert ticks[:5] == ["0.0", "0.1", "0.2", "0.3", "1.0"]


def test_values_by_sequence_and_by_position():
    apart = fc.head_ablation(TRACE, per_sequence=True)
    shown = apart.plot().axes[0].images[0].get_array().data
    expected = apart.delta.mean(-1).numpy()
    np.testing.assert_allclose(shown / np.abs(shown).max(), expected / np.abs(expected).max())
    each = fc.head_ablation(TRACE, at="each")
    shown = each.plot().axes[0].images[0].get_array().data
    expected = each.delta.flatten(0, 1).numpy()
    assert shown.shape == expected.shape == (12, 9)
    np.testing.assert_allclose(shown / np.abs(shown).max(), expected / np.abs(expected).max())
    queries = fc.activation_patching(TRACE, fc.trace(WEIGHTS, random_tokens(2, 9, seed=1)), what="q")
    assert queries.plot().axes[0].images[0].get_array().shape == (3, 4)
    rows = [x.get_text() for x in each.plot().axes[0].get_yticklabels()]
    assert rows[5] == "1.1"
    assert HEADS.plot(sequence=1).axes[0].images[0].get_array().shape == (12, 8)


def test_what_does_not_exist_is_blank_and_a_zero_is_not():
    values = torch.zeros(3, 2, 3, 2)
    values[0, 0, 2, 1] = 1.0
    figure = fc.plot.pairs(-values, scale="x")
    assert pixel(figure, 2, 0).tolist() == [1, 1, 1]  # from layer 1 to layer 1: there is no such pair
    zero, largest = pixel(figure, 1, 0), pixel(figure, 0, 3)
    assert zero.max() < 0.93
    assert np.ptp(zero) < 0.02  # grey
    assert largest[2] > largest[0]  # negative: blue
    other = pixel(fc.plot.pairs(values - 1e-9, scale="x"), 0, 3)
    assert other[0] > other[2]  # positive: red
    norm = figure.axes[0].images[0].norm
    assert norm.vmin == -norm.vmax == -1


def test_palettes_are_told_apart_without_colour_vision():
    """Lightness alone orders each side; and both ends differ for people who see no red or no green."""
    for palette, ends in ((page.RISING, (0, 1)), (page.DIVERGING, (0.5, 1)), (page.DIVERGING, (0.5, 0))):
        colours = np.array([palette(x)[:3] for x in np.linspace(*ends, 20)])
        lightness = colours @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness) < 0).all()
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])  # Machado et al. 2009
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    for seen in (protan, deutan):
        for x in (0.1, 0.25, 0.4):
            low, high = (seen @ np.array(page.DIVERGING(y)[:3]) for y in (x, 1 - x))
            assert np.abs(low - high).max() > 0.12


def test_numbers_are_printed_where_all_fit_and_nowhere_else():
    generator = torch.Generator().manual_seed(0)
    for columns in (3, 9, 25, 60):
        figure = fc.plot.heads(torch.randn(4, columns, generator=generator), scale="x")
        axes = figure.axes[0]
        assert len(axes.texts) in (0, 4 * columns)
        assert bool(axes.texts) == (columns < 30)
        renderer = drawn(figure).get_renderer()
        cell = axes.bbox.width / columns
        for text in axes.texts:
            assert text.get_window_extent(renderer).width < cell


@pytest.mark.parametrize(
    ("value", "bound", "text"),
    [(1.234, 1.234, "1.23"), (-0.04, 12.0, "0"), (-0.05, 1.2, "−0.05"), (123.4, 123.4, "123"), (0.0, 0.0, "0"),
     (2e-5, 2e-5, "0.000020"), (float("nan"), 1.0, ""), (float("inf"), 1.0, "inf")],
)  # fmt: skip
def test_numbers(value, bound, text):
    assert page.number(value, bound) in (text, f"{text}0")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", "a↵b"), (" x ", "·x·"), ("   ", "···"), ("\x1b", "\\x1b"), ("", ""), ("a" * 50, "a" * 39 + "…")],
)
def test_texts_of_tokens(text, shown):
    assert page.shown(text) == shown


def test_a_dollar_is_no_formula():
    figure = fc.plot.attention(TRACE, (0, 0), tokens=["$x_1$"] * 9)
    assert all(not label.get_parse_math() for label in figure.axes[0].get_yticklabels())
    drawn(fc.plot.heads(torch.ones(1, 1), title="$\\nonsense{$", scale="$x"))


def test_large_matrices_show_the_largest_of_a_block():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1500, 1400, generator=generator).double().numpy()
    values[:8, :8] = np.nan
    figure = matrix.matrix(values, matrix.Side("", ["x"] * 1500), matrix.Side("", ["y"] * 1400), title="", scale="")
    shown = figure.axes[0].images[0].get_array().data
    assert shown.shape == (500, 700)
    assert np.isnan(shown[0, 0])
    assert not np.isnan(shown[2, 4])
    for i, j in ((4, 9), (499, 699), (100, 300)):
        block = values[3 * i : 3 * i + 3, 2 * j : 2 * j + 2]
        assert shown[i, j] == block.flat[np.abs(block).argmax()]
    assert any("largest in size of 3 x 2" in text for text, _ in texts(figure))


def test_blocks_keep_to_layers():
    layers = [(f"layer {i}", 64 * i, 64 * i + 64) for i in range(80)]
    assert matrix._step(80 * 64, layers) == 8
    assert matrix._step(80 * 61, [(str(i), 61 * i, 61 * i + 61) for i in range(80)]) == 61


def test_patterns_stand_where_their_heads_do():
    figure = fc.plot.patterns(TRACE)
    shown = figure.axes[0].images[0].get_array().data
    side = 9 + max(1, round(0.08 * 9))
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        part = shown[layer * side : layer * side + 9, head * side : head * side + 9]
        expected = TRACE.pattern(layer)[0, head].double().numpy()
        np.testing.assert_allclose(np.tril(np.nan_to_num(part)), expected)
        assert np.isnan(part[np.triu_indices(9, 1)]).all()
    assert np.isnan(shown[9]).all()


@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")])
def test_formats(name, start, tmp_path):
    figure = PAIRS.plot(title="pairs of heads")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        figure.savefig(
            tmp_path / folder / name,
            metadata={"CreationDate": None} if name == "x.pdf" else {"Date": None} if name == "x.svg" else {},
        )
    first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
    assert first.startswith(start)
    assert first == second
    if name == "x.pdf":
        assert b"/Type3" not in first  # journals refuse such fonts


def test_notebooks_show_a_table_and_a_picture(monkeypatch):
    sweep = fc.sweep(WEIGHTS, TRACE.tokens, "head")
    trigrams = fc.skip_trigrams(WEIGHTS, (0, 1), k=4, text=lambda x: "<script>alert(1)</script>")
    shown = [PAIRS, HEADS, SCORES, sweep, sweep.marginals, trigrams, fc.qk_terms(TRACE, (1, 1)),
             fc.virtual_head(TRACE, (0, 1), (2, 1)), fc.component_scores(WEIGHTS, "Q", (0, 1), (2, 1)),
             fc.subspaces(TRACE, (0, 1), (2, 1))]  # fmt: skip
    for found in shown:
        html = found._repr_html_()
        assert re.search(r"<table>.*</table>", html), found
        assert "src='data:image/png;base64,iVBOR" in html
        assert "<script" not in html
    (a, b), value = PAIRS.top(1)[0]
    assert f"<td style='text-align:left'>{label_name((a, b)).replace('>', '&gt;')}</td>" in PAIRS._repr_html_()
    assert f"{value:+.4g}" in PAIRS._repr_html_()
    empty = fc.pair_ablation(fc.trace(random_weights(1), random_tokens(1, 5)))
    assert "img" not in empty._repr_html_()
    for name in [name for name in sys.modules if name.startswith("pyfastcircuits.drawing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'pyfastcircuits\[plot\]'"):
        PAIRS.plot()


@pytest.mark.processes
def test_matplotlib_is_imported_with_the_first_figure():
    code = (
        "import sys, pyfastcircuits as fc; assert 'plot' in dir(fc); before = 'matplotlib' in sys.modules; fc.plot.pairs;"
        "print(before, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["False", "True", "False"]


LAYERLESS = fc.trace(random_weights(0), random_tokens(1, 5))
BAD = [
    (lambda: PAIRS.plot("rank"), ValueError, "quantity is 'rank', expected one of nll, kl"),
    (lambda: PAIRS.plot(most=0), ValueError, "most is 0"),
    (lambda: HEADS.plot(sequence=2), IndexError, "sequence is 2, expected 0 to 1"),
    (lambda: HEADS.plot(tokens=["a"]), ValueError, "tokens has 1 texts, expected one for each of 8"),
    (lambda: fc.head_ablation(LAYERLESS).plot(), ValueError, "labels is empty"),
    (lambda: fc.plot.pairs(torch.zeros(2, 3)), ValueError, r"found has shape \[2, 3\], expected \[L, H, L, H\]"),
    (lambda: fc.plot.pairs(torch.zeros(1, 3, 1, 3)), ValueError, "found is of 1 layer"),
    (lambda: fc.plot.pairs(SCORES), ValueError, "found is a Result of something else, expected one of pairs"),
    (lambda: fc.plot.heads(PAIRS), ValueError, "found is a Result of something else"),
    (lambda: fc.plot.heads(torch.zeros(3)), ValueError, r"found has shape \[3\]"),
    (lambda: fc.plot.orders(torch.zeros(2, 2)), ValueError, r"found has shape \[2, 2\]"),
    (lambda: fc.plot.scatter(SCORES, "induction", "rank"), ValueError, "y is 'rank', expected one of induction"),
    (lambda: fc.plot.scatter(HEADS, "nll", "nll"), ValueError, "found has positions"),
    (lambda: fc.plot.attention(TRACE, (7, 0)), IndexError, "head is 7.0"),
    (lambda: fc.plot.attention(TRACE, (0, 0), tokens=["a"]), ValueError, "tokens has 1 texts, expected 9"),
    (lambda: fc.plot.patterns(TRACE, layers=[]), ValueError, "layers is empty"),
    (lambda: fc.plot.eigenvalues(WEIGHTS, heads=[(0, 9)]), IndexError, "heads is 0.9"),
    (lambda: fc.plot.composition(random_weights(1)), ValueError, "weights has 1 layers"),
    (lambda: fc.plot.rainbow, AttributeError, "no attribute 'rainbow'"),
    (lambda: fc.rainbow, AttributeError, "no attribute 'rainbow'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_odd_values():
    """Nothing but NaN, infinities, one point, no spread."""
    for values in (torch.full((2, 3), torch.nan), torch.tensor([[torch.inf, 1.0], [-1.0, 0.0]]), torch.zeros(1, 1)):
        drawn(fc.plot.heads(values, scale="x"))
    drawn(marks.curve([0], {"a": [1.0]}, title="", x="x", y="y"))
    drawn(marks.scatter([1.0, torch.nan], [1.0, 1.0], ["a", "b"], title="", x="", y=""))
    drawn(marks.bars([], [], title="none", x=""))
    drawn(marks.spectra(np.zeros((1, 4), dtype=complex), ["none"], title=""))
    drawn(patterns.pattern(np.eye(1), None, title=""))
    assert labelled.grid([((0, 0), (1, i)) for i in range(3)] + [((5, 0), (9, i)) for i in range(3)], np.ones(6))
