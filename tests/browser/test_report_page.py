"""The report in a real browser: what each section does with a mouse, a keyboard and a finger, and how it looks.

Playwright drives the Chromium of this machine. Screenshots are left in build/report, at the widths of a laptop and of a
phone.
"""

import csv
import io
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.hostile import HOSTILE, NAME, hostile_tokenizer
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = Path(__file__).parents[2] / "build" / "report"
SECTIONS = ("orders", "pairs", "composition", "spectra", "trigrams", "attention", "scores", "attribution", "provenance")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="there is no Chromium on this machine"),
]


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI needs a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def induction(tmp_path_factory):
    """The report of the bundled model."""
    return fc.report("induction-2l", out=tmp_path_factory.mktemp("report") / "induction.html")


class Opened:
    """A page, and what it complains of or asks for."""

    def __init__(self, browser, file, width=1400, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.troubles, self.requests = [], []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: self.troubles.append(f"a dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        assert self.page.evaluate("document.documentElement.dataset.ready") == "yes", self.troubles

    def good(self):
        """Nothing was complained of, and nothing but the file was asked for."""
        assert not self.troubles, self.troubles
        outside = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert not outside, outside
        assert sum(url.startswith("file:") for url in self.requests) == 1

    def text(self, selector):
        return self.page.inner_text(selector)

    def saved(self, selector):
        with self.page.expect_download() as download:
            self.page.click(selector)
        return Path(download.value.path()).read_text("utf-8")


@pytest.fixture(scope="module")
def opened(browser, induction):
    opened = Opened(browser, induction)
    yield opened
    opened.good()
    opened.context.close()


@pytest.fixture
def page(opened):
    return opened.page


def cell(page, matrix, row, column, rows=8, columns=8):
    """The middle of a cell on the screen."""
    box = page.locator(f"#{matrix} .nsewdrag").bounding_box()
    return box["x"] + box["width"] * (column + 0.5) / columns, box["y"] + box["height"] * (row + 0.5) / rows


class TestSections:
    def test_the_file_is_small_enough(self, induction):
        assert induction.stat().st_size < 8e6

    def test_every_section_and_figure_is_drawn(self, page):
        assert page.evaluate("[...document.querySelectorAll('main section')].map((x) => x.id)") == list(SECTIONS)
        for chart in (
            "curve",
            "marginals",
            "pair-matrix",
            "composition-matrix",
            "spectrum",
            "copying",
            "attribution-bars",
        ):
            assert page.locator(f"#{chart} svg.main-svg").count() >= 1, chart
            assert page.get_attribute(f"#{chart}", "aria-label")
        assert page.locator("#attention-heads .tile canvas").count() == 16
        for pattern in ("attention-head", "induction", "virtual-pattern"):
            assert (
                len(
                    set(
                        page.evaluate(
                            f"[...document.querySelector('#{pattern} canvas').getContext('2d').getImageData(0, 0, 49, 49).data]"
                        )
                    )
                )
                > 20
            )
        assert page.locator("#score-table tbody tr").count() == 16
        assert page.locator("nav a").count() == 9

    def test_numbers_are_unpacked_as_they_are(self, page):
        weights = fc.load_weights("induction-2l")
        tokens = page.evaluate("DATA.tokens.map((row) => row.map((t) => rawPiece(t)))")
        assert len(tokens) == 16
        assert all(row[0] == "[START]" for row in tokens)
        scores = fc.composition_scores(weights, "K")[0, :, 1].flatten()
        found = page.evaluate("[...unpack(DATA.composition.K.score).values]")
        assert found == pytest.approx(scores.tolist(), rel=1e-3)
        assert page.evaluate(
            "half(0x3c00) === 1 && half(0xc000) === -2 && half(1) === 2 ** -24 && Number.isNaN(half(0x7e00))"
        )


class TestPairs:
    def test_a_click_shows_where_a_pair_matters(self, opened, page):
        page.locator("#pairs").scroll_into_view_if_needed()
        before = opened.text("#pair-said")
        page.mouse.click(*cell(page, "pair-matrix", 2, 1))
        assert opened.text("#pair-title") == "Where the path 0.2 → 1.1 matters"
        assert opened.text("#pair-said") != before
        assert page.locator("#pair-contexts li").count() == 10
        changes = page.evaluate("[...document.querySelectorAll('#pair-contexts .change')].map((x) => x.textContent)")
        assert all(change.startswith("+") for change in changes)

    def test_a_context_leads_to_its_place_in_the_text(self, opened, page):
        button = page.locator("#pair-contexts button").nth(3)
        target = button.locator(".target").inner_text()
        button.click()
        chosen = page.locator("#pair-text .token[aria-selected=true]")
        assert chosen.inner_text() == target
        change = button.locator(".change").inner_text()
        assert f"changes by {change}" in opened.text("#pair-token")
        assert page.locator("#pair-text .token[style*=rgba]").count() > 5

    def test_arrow_keys_walk_through_the_matrix(self, opened, page):
        page.mouse.click(*cell(page, "pair-matrix", 0, 0))
        page.focus("#pair-matrix")
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowLeft"):
            page.keyboard.press(key)
        assert opened.text("#readout-pair-matrix").startswith("0.1 → 1.0:")
        assert opened.text("#pair-title") == "Where the path 0.0 → 1.0 matters"
        page.keyboard.press("Enter")
        assert opened.text("#pair-title") == "Where the path 0.1 → 1.0 matters"

    def test_its_numbers_are_those_of_the_library(self, opened, page):
        rows = list(csv.DictReader(io.StringIO(opened.saved("[data-csv=pair-matrix]"))))
        assert len(rows) == 64
        assert json.loads(rows[0]["source"]) == "0.0"
        best = max(rows, key=lambda row: float(row["rise_nats"]))
        assert f"{json.loads(best['source'])} → {json.loads(best['destination'])}" in opened.text("#pairs .said")


class TestComposition:
    def test_kinds_forms_and_virtual_heads(self, opened, page):
        page.locator("#composition").scroll_into_view_if_needed()
        page.mouse.click(*cell(page, "composition-matrix", 6, 4))
        assert opened.text("#virtual-title") == "Virtual head 0.6 → 1.4"
        assert page.locator("#virtual-scores tbody tr").count() == 3
        assert page.locator("#virtual-entries tbody tr").count() == 6
        seen = [opened.text("#readout-composition-matrix")]
        page.click("#choice-kind label:has-text('Q queries')")
        seen.append(opened.text("#readout-composition-matrix"))
        assert [re.search("([QKV])-composition", text)[1] for text in seen] == ["K", "Q"]
        z = page.evaluate("document.querySelector('#composition-matrix').data[0].z[6][4]")
        raw, rest = [], []
        for label, into in (("score", raw), ("score − random", rest)):
            page.locator("#choice-form label").get_by_text(label, exact=True).click()
            into.append(page.evaluate("document.querySelector('#composition-matrix').data[0].z[6][4]"))
        weights = fc.load_weights("induction-2l")
        assert raw[0] == pytest.approx(float(fc.composition_scores(weights, "Q")[0, 6, 1, 4]), rel=1e-3)
        assert rest[0] == pytest.approx(
            raw[0] - float(fc.composition_baseline(weights, "Q").mean[0, 6, 1, 4]), abs=1e-4
        )
        assert abs(z) > 1
        page.click("#choice-form label:has-text('z-score')")

    def test_the_virtual_pattern_is_the_product(self, page):
        page.select_option("#attention-sequence", index=0)
        found = page.evaluate("(() => { const x = virtualPattern(6, 12); return [x.size, ...x]; })()")
        size, values = found[0], torch.tensor(found[1:]).view(found[0], found[0])
        text = page.evaluate("DATA.tokens[0].map((t) => rawPiece(t))")
        assert size == len(text)
        trace = fc.trace(fc.load_weights("induction-2l"), _tokens(text))
        plain = trace.pattern(1)[0, 4] @ trace.pattern(0)[0, 6]
        assert (values - plain).abs().max() < 0.02


def _tokens(pieces):
    from pyfastcircuits.adapters.texts import TokenText

    text = TokenText("induction-2l")
    ids = [text.tokenizer.token_to_id("[START]")]
    for piece in pieces[1:]:
        ids += text.encode(piece)[0]
    return torch.tensor(ids)


class TestSpectra:
    def test_heads_circuits_and_radius(self, opened, page):
        page.locator("#spectra").scroll_into_view_if_needed()
        page.select_option("#spectrum-head", label="0.1")
        assert "OV circuit of head 0.1" in opened.text("#readout-spectrum")
        assert page.locator("#spectrum .scatterlayer .point").count() == 32
        page.click("#choice-circuit label:has-text('QK')")
        assert "QK circuit of head 0.1" in opened.text("#readout-spectrum")
        inside = "Math.max(...document.querySelector('#spectrum').data[0].x.map(Math.abs))"
        assert page.evaluate(inside) <= 1
        page.click("#choice-radius label:has-text('linear')")
        assert page.evaluate(inside) > 1
        bars = page.locator("#copying .nsewdrag").bounding_box()
        page.mouse.click(bars["x"] + bars["width"] * 2.5 / 16, bars["y"] + bars["height"] / 2 + 3)
        values = page.evaluate("document.querySelector('#copying').data[0].y")
        assert len(values) == 16


class TestTrigrams:
    def test_a_search_finds_tokens(self, opened, page):
        everything = page.locator("#trigram-table tbody tr").count()
        assert everything == 60
        page.fill("#trigram-search", "doesn")
        rows = page.evaluate("[...document.querySelectorAll('#trigram-table tbody tr')].map((x) => x.textContent)")
        assert 0 < len(rows) < everything
        assert all("doesn" in row for row in rows)
        page.fill("#trigram-search", "·to")
        sources = page.evaluate(
            "[...document.querySelectorAll('#source-table tbody tr')].map((x) => x.cells[0].textContent)"
        )
        assert sources
        assert all("·to" in source.lower() for source in sources)
        assert "have that text" in opened.text("#trigram-count")
        page.fill("#trigram-search", "no such token")
        assert opened.text("#trigram-count").startswith("0 skip-trigrams and 0 rows")
        page.fill("#trigram-search", "")
        page.select_option("#trigram-head", label="1.6")
        heads = page.evaluate(
            "[...document.querySelectorAll('#trigram-table tbody tr')].map((x) => x.cells[0].textContent)"
        )
        assert set(heads) == {"1.6"}
        page.select_option("#trigram-head", label="direct path (bigrams)")
        assert opened.text("#title-trigram-table") == "Largest bigrams"
        page.select_option("#trigram-head", label="all heads")


class TestAttention:
    def test_pointing_at_a_token_shows_where_heads_look_and_a_click_keeps_it(self, opened, page):
        text = page.locator("#attention-text .token")
        text.nth(20).scroll_into_view_if_needed()
        text.nth(20).hover()
        assert "(position 20)" in opened.text("#attention-said")
        looks = page.locator("#attention-heads .where").all_inner_texts()
        text.nth(30).hover()
        assert "(position 30)" in opened.text("#attention-said")
        assert page.locator("#attention-heads .where").all_inner_texts() != looks
        text.nth(30).click()
        assert "Kept" in opened.text("#attention-said")
        text.nth(12).hover()
        assert "(position 30)" in opened.text("#attention-said")
        assert page.locator("#attention-text .token[aria-selected=true]").count() == 1
        page.keyboard.press("Escape")
        text.nth(12).hover()
        text.nth(13).hover()
        assert "(position 13)" in opened.text("#attention-said")

    def test_heads_by_click_and_by_arrow_keys(self, opened, page):
        page.locator("#attention-heads .tile").nth(5).click()
        assert opened.text("#title-attention-head") == "Pattern of head 0.5"
        page.keyboard.press("ArrowRight")
        assert opened.text("#title-attention-head") == "Pattern of head 0.6"
        assert page.evaluate("document.activeElement.dataset.head") == "6"

    def test_tokens_by_arrow_keys(self, opened, page):
        page.locator("#attention-text .token").nth(10).click()
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.dataset.place") == "11"
        assert "(position 11)" in opened.text("#attention-said")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
        assert "(position 11)" in opened.text("#attention-said")
        page.keyboard.press("Escape")
        page.keyboard.press("End")
        assert "(position 63)" in opened.text("#attention-said")

    def test_value_weighted(self, page):
        page.select_option("#attention-sequence", index=0)
        row = "(() => { const f = viewer.entries(3); return Array.from({ length: 64 }, (_, k) => f(63, k)); })()"
        plain = torch.tensor(page.evaluate(row))
        page.click("#choice-weighted label:has-text('value-weighted')")
        weighted = torch.tensor(page.evaluate(row))
        lengths = torch.tensor(page.evaluate("[...at(unpack(DATA.attention.text.values), 0, 3)]"))
        expected = plain * lengths
        assert torch.allclose(weighted, expected / expected.sum(), atol=1e-5)
        assert (weighted - plain).abs().max() > 0.01
        page.click("#choice-weighted label:has-text('as it is')")

    def test_the_induction_head_over_random_tokens(self, opened, page):
        page.locator("#induction-text .token").nth(40).click()
        found = re.search(r"is at position (\d+) and gets (\d\.\d+)", opened.text("#induction-said"))
        assert int(found[1]) == 40 - 24 + 1
        assert float(found[2]) > 0.5
        canvas = page.locator("#induction canvas")
        canvas.scroll_into_view_if_needed()
        canvas.hover(position={"x": 5, "y": 5})
        assert opened.text("#readout-induction").startswith("From [START] (position 0) to [START]")


class TestTables:
    def test_columns_sort(self, opened, page):
        def column(i):
            cells = f"[...document.querySelectorAll('#score-table tbody tr')].map((x) => x.cells[{i}].textContent)"
            return [float(x.replace("−", "-")) for x in page.evaluate(cells)]

        assert column(1) == sorted(column(1), reverse=True)
        header = page.locator("#score-table th").nth(2)
        header.locator("button").click()
        assert column(2) == sorted(column(2), reverse=True)
        assert page.locator("#score-table th").nth(2).get_attribute("aria-sort") == "descending"
        page.keyboard.press("Enter")
        assert column(2) == sorted(column(2))
        page.locator("#score-table th button").first.click()
        assert column(0) == sorted(column(0))


class TestAttribution:
    def test_a_chosen_token_is_taken_apart(self, opened, page):
        page.select_option("#attribution-sequence", index=2)
        token = page.locator("#attribution-text .token").nth(17)
        token.click()
        assert "at position 17 " in opened.text("#readout-attribution-bars")
        rows = list(csv.DictReader(io.StringIO(opened.saved("[data-csv=attribution-bars]"))))
        assert {json.loads(row["component"]) for row in rows} == {
            "embed",
            *(f"{i}.{j}" for i in (0, 1) for j in range(8)),
        }
        total = sum(float(row["logit"]) for row in rows)
        said = re.search(r"is ([+−][\d.]+) above", opened.text("#readout-attribution-bars"))[1]
        assert float(said.replace("−", "-")) == pytest.approx(total, rel=0.01)


class TestSaving:
    def test_every_figure_saves_svg_and_csv(self, opened, page):
        buttons = page.evaluate("[...document.querySelectorAll('[data-svg]')].map((x) => x.dataset.svg)")
        assert len(buttons) == 12
        for name in buttons:
            svg = ET.fromstring(page.evaluate(f"SAVED['{name}'].svg()"))
            assert svg.tag.endswith("svg"), name
            assert not [x for x in svg.iter() if x.tag.endswith("script")]
        for name in page.evaluate("[...document.querySelectorAll('[data-csv]')].map((x) => x.dataset.csv)"):
            rows = list(csv.reader(io.StringIO(page.evaluate(f"csvText(SAVED['{name}'].csv())"))))
            assert len(rows) > 1, name
            assert len({len(row) for row in rows}) == 1, name
        assert opened.saved("[data-svg=curve]").startswith("<svg")

    def test_numbers_are_there_as_tables(self, page):
        page.click("#figure-curve summary")
        rows = page.locator("#numbers-curve tbody tr")
        rows.nth(3).wait_for()
        assert rows.count() == 4
        page.click("#figure-curve summary")

    def test_everything_is_reached_by_tab(self, page):
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        seen = set()
        for _ in range(160):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("(document.activeElement.closest('[id]') ?? {}).id"))
        assert {
            "theme",
            "pair-matrix",
            "composition-matrix",
            "trigram-search",
            "attention-text",
            "attention-heads",
        } <= seen
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_looks(browser, induction, width, scheme):
    """Screenshots; the page is as wide as the window; the button changes the theme, and figures follow."""
    opened = Opened(browser, induction, width, scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.add_style_tag(content=".top { position: static !important }")  # or it lies over what is scrolled to
    page.screenshot(path=SHOTS / f"page-{width}-{scheme}.png", full_page=True)
    if scheme == "light":
        for section in SECTIONS:
            page.locator(f"#{section}").screenshot(path=SHOTS / f"{section}-{width}.png")
    colours = "[getComputedStyle(document.body).backgroundColor, document.querySelector('#curve').layout.font.color]"
    before = page.evaluate(colours)
    page.click("#theme")
    assert all(a != b for a, b in zip(before, page.evaluate(colours), strict=True))
    assert page.get_attribute("#theme", "aria-pressed") == str(scheme == "light").lower()
    opened.good()
    opened.context.close()


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_hostile_tokens_names_and_texts_stay_text(browser, layers, tmp_path):
    tokens = torch.cat((torch.arange(12).expand(2, -1), random_tokens(2, 8)), 1)
    given = {"tokenizer": hostile_tokenizer(), "name": NAME, "source": HOSTILE[1]}
    file = fc.report(random_weights(layers), tokens, out=tmp_path / "'\"<b>&#.html", **given)
    opened = Opened(browser, file)
    page = opened.page
    assert page.locator("main img, main b, main svg[onload], main script").count() == 0
    assert page.inner_text("#model") == NAME
    texts = page.locator("#attribution-text .token").all_inner_texts()
    assert texts[0] == HOSTILE[0].replace(" ", "·")
    assert texts[7] == "U+202Eback"
    for i in range(1, 12):
        page.locator("#attribution-text .token").nth(i).click()
    for name in page.evaluate("Object.keys(SAVED).filter((x) => SAVED[x].svg)"):
        ET.fromstring(page.evaluate(f"SAVED['{name}'].svg()"))
    rows = page.evaluate("csvText(SAVED['trigram-table'].csv())")
    assert not re.search('(^|,)"?[=+@]', rows)
    page.fill("#trigram-search", HOSTILE[0])
    opened.good()
    opened.context.close()


def test_many_heads_stay_readable(browser, tmp_path):
    """144 heads: cells of pairs that do not exist are blank, ticks have room, and no list is longer than its frame."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = fc.CircuitWeights(
        normal(40, 24),
        normal(12, 12, 24, 2),
        normal(12, 12, 24, 2),
        normal(12, 12, 24, 2),
        normal(12, 12, 2, 24),
        normal(24, 40),
    )
    opened = Opened(browser, fc.report(weights, random_tokens(1, 10, 40), out=tmp_path / "r.html"))
    page = opened.page
    z = page.evaluate("document.querySelector('#pair-matrix').data[0].z")
    assert (len(z), len(z[0])) == (132, 132)
    assert sum(x is None for row in z for x in row) == 132**2 - 66 * 144
    boxes = page.evaluate(
        "[...document.querySelectorAll('#pair-matrix .xtick text')].map((x) => { const b = x.getBoundingClientRect(); return [b.left, b.right]; })"
    )
    assert len(boxes) > 5
    assert all(a[1] < b[0] for a, b in pairwise(boxes))
    assert page.locator("#attention-heads").bounding_box()["height"] < 600
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.locator("#pairs").screenshot(path=SHOTS / "pairs-144-heads.png")
    opened.good()
    opened.context.close()
