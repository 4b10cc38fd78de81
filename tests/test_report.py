"""`fc.report`: its numbers are those of plain forms, its page lets nothing run or be fetched, its sizes have bounds."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from support.command import refused, run
from support.hostile import HOSTILE, NAME, hostile_tokenizer
from support.random_models import random_tokens, random_weights
from tokenizers import Tokenizer, models

import pyfastcircuits as fc
from pyfastcircuits.adapters.texts import TokenText
from pyfastcircuits.reports import make, sections, study
from pyfastcircuits.reports.pack import Pieces, as_json, halves, numbers, rounded, shares
from pyfastcircuits.sweeps.identity import model_hash


class Page(HTMLParser):
    """The elements of a page, the text of its scripts, and its data."""

    def __init__(self, file):
        super().__init__(convert_charrefs=True)
        self.content = file.read_text("utf-8")
        self.tags, self.scripts, self.text, self.policy, self._in = [], [], "", "", ""
        self.feed(self.content)
        self.data = json.loads(next(body for kind, body in self.scripts if kind == "application/json"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            kind, body = self.scripts[-1]
            self.scripts[-1] = kind, body + data
        elif self._in != "style":
            self.text += data


def unpacked(packed):
    kinds = {"f16": torch.float16, "u8": torch.uint8, "u16": torch.uint16}
    content = bytearray(base64.b64decode(packed["bytes"]))
    values = torch.frombuffer(content, dtype=kinds[packed["type"]]).double()
    return values.view(packed["shape"]) * packed["scale"]


@pytest.fixture(scope="module")
def weights():
    return random_weights(3, heads=4, kv=2, norm="rmsnorm", biases=True)


@pytest.fixture(scope="module")
def ids():
    return random_tokens(3, 13)


@pytest.fixture(scope="module")
def page(weights, ids, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "it's <b>.html"
    given = {"tokenizer": hostile_tokenizer(), "name": NAME, "source": '<b>it\'s</b> "text".txt'}
    assert fc.report(weights, ids, out=file, **given) == file
    return Page(file)


class TestPack:
    def test_halves_keep_three_digits_of_small_values(self):
        values = torch.randn(7, 11, dtype=torch.float64) * torch.logspace(-6, 0, 11, dtype=torch.float64)
        values[2, 3] = torch.nan
        found = unpacked(halves(values))
        assert found.isnan().equal(values.isnan())
        error, size = (x.abs().nan_to_num() for x in (found - values, values))
        assert (error <= 6e-4 * size + 4e-11 * size.max()).all()

    @pytest.mark.parametrize("values", [torch.zeros(3), torch.full((2, 1), torch.nan)])
    def test_halves_of_nothing(self, values):
        assert torch.allclose(unpacked(halves(values)), values.double(), equal_nan=True)

    def test_shares_and_numbers(self):
        values = torch.rand(5, 9, dtype=torch.float64)
        assert (unpacked(shares(values)) - values).abs().max() <= 0.5 / 255 + 1e-12
        places = torch.randint(0, 65_536, (4, 7))
        assert unpacked(numbers(places)).equal(places.double())

    def test_rounded(self):
        assert rounded(torch.tensor([1.23456789, float("nan"), float("inf")], dtype=torch.float64)) == [
            1.23457,
            None,
            None,
        ]

    def test_json_ends_no_script_and_says_the_same(self):
        found = as_json(HOSTILE)
        assert not set(found) & set("<>&\u2028\u2029")
        assert json.loads(found) == HOSTILE


class TestPieces:
    def test_bytes_of_the_bundled_tokenizer(self):
        text = TokenText("induction-2l")
        pieces = Pieces(text)
        whole = "x = 'é日🙂'\n\t  end"
        (ids,) = text.encode(whole)
        shown = [pieces.shown[i] for i in pieces(ids)]
        assert any("0x" in part for entry in shown if isinstance(entry, list) for part in entry[2::2])
        raw = b""
        for entry in shown:
            raw += (
                entry.encode()
                if isinstance(entry, str)
                else b"".join(_bytes(part, i) for i, part in enumerate(entry[1:]))
            )
        assert raw.decode() == whole

    def test_every_token_of_the_bundled_tokenizer_is_shown(self):
        text = TokenText("induction-2l")
        pieces = Pieces(text)
        pieces(list(range(4096)))
        for token, entry in enumerate(pieces.shown):
            plain = [entry] if isinstance(entry, str) else entry[1::2]
            assert all(part.isprintable() and " " not in part for part in plain), (token, entry)
            assert "".join([entry] if isinstance(entry, str) else entry[1:])

    def test_ids(self, worded):
        assert Pieces(TokenText(None)).shown == []
        pieces = Pieces(TokenText(None))
        assert pieces(torch.tensor([[5, 7], [7, 5]])) == [[0, 1], [1, 0]]
        assert pieces.shown == [["5", "", "#5"], ["7", "", "#7"]]
        padded = Pieces(TokenText(worded))
        padded([3, 5000])
        assert padded.shown == ["a3", ["<id 5000>", "", "<id 5000>"]]

    def test_spaces_that_a_tokenizer_underlines_and_bytes_that_it_names(self):
        from tokenizers import decoders

        tokenizer = Tokenizer(models.BPE({"▁the": 0, "<0xE2>": 1, "▁": 2}, []))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        pieces = Pieces(TokenText(None, tokenizer))
        pieces([0, 1, 2])
        assert pieces.shown == [[" the", "", "·", "the"], ["\\xe2", "", "0xe2"], [" ", "", "·"]]


def _bytes(part, i):
    if i % 2 == 0:
        return part.encode()
    out = b""
    for word in re.findall(r"0x..|.", part.replace(" ", "")):
        out += (
            bytes.fromhex(word[2:])
            if word.startswith("0x") and len(word) == 4
            else {"·": b" ", "↵": b"\n", "⇥": b"\t"}[word]
        )
    return out


class TestPage:
    def test_nothing_runs_but_what_the_policy_names(self, page):
        kinds = [kind for kind, _ in page.scripts]
        assert kinds == ["application/json", None, None]
        assert page.policy.startswith("default-src 'none'; ")
        allowed = set(re.findall(r"'sha256-([^']+)'", page.policy))
        made = {
            base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for kind, body in page.scripts if not kind
        }
        assert allowed == made
        assert len(made) == 2
        assert "unsafe-inline" not in page.policy.split("script-src")[1].split(";")[0]

    def test_no_element_comes_of_tokens_or_names(self, page):
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"img", "iframe", "object", "embed", "link", "svg", "base", "form", "b"}
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert not {"src", "srcset", "action", "style"} & set(attributes), (tag, attributes)
            assert attributes.get("href", "#").startswith("#")
        assert NAME in page.text
        assert '<b>it\'s</b> "text".txt' in page.text

    def test_tokens_arrive_as_they_are(self, page, ids):
        raw = [entry if isinstance(entry, str) else entry[0] for entry in page.data["pieces"]]
        words = HOSTILE + [f"a{i}" for i in range(len(HOSTILE), 97)]
        assert [[raw[i] for i in row] for row in page.data["tokens"]] == [
            [words[t] for t in row] for row in ids.tolist()
        ]
        shown = {entry[0]: entry[1:] for entry in page.data["pieces"] if isinstance(entry, list)}
        assert shown["\u202eback"] == ["", "U+202E", "back"]
        assert shown["\u2028\u2029"] == ["", "U+2028 U+2029"]

    def test_a_report_repeats_itself(self, page, weights, ids, tmp_path):
        again = fc.report(
            weights, ids, out=tmp_path / "again.html", tokenizer=hostile_tokenizer(), name=NAME,
            source="<b>it's</b> \"text\".txt",
        )  # fmt: skip
        varying = r'(<dd id="fact-(?:made|seconds)">).*?</dd>'
        same = [re.sub(varying, r"\1</dd>", content) for content in (page.content, again.read_text("utf-8"))]
        assert same[0] == same[1]

    def test_provenance(self, page, weights, ids):
        facts = dict(re.findall(r'<dd id="fact-(\w+)"><bdi>(.*?)</bdi>', page.content))
        assert set(facts) == {
            "model", "model_sha256", "text", "tokens_sha256", "options", "versions", "machine", "made", "seconds",
        }  # fmt: skip
        assert f"pyfastcircuits {fc.__version__}" in facts["versions"]
        assert torch.__version__ in facts["versions"]
        assert facts["options"] == "3 sequences of 13 tokens, backend auto"
        moved = dataclasses.replace(weights, W_O=weights.W_O + 1e-9)
        assert facts["model_sha256"] == model_hash(fc.trace(weights, ids)) != model_hash(fc.trace(moved, ids))
        assert facts["tokens_sha256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()


class TestNumbers:
    """Against plain forms in fp64."""

    @pytest.fixture(scope="class")
    def clean(self, weights, ids):
        return fc.trace(weights, ids)

    def test_orders(self, page, weights, clean):
        for order, loss in enumerate(page.data["orders"]["losses"]):
            paths = [p for k in range(order + 1) for p in fc.enumerate_paths(3, 4, k)]
            logits = sum(fc.path_logits(clean, path) for path in paths)
            plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), clean.tokens[:, 1:].flatten())
            assert loss == pytest.approx(float(plain), rel=1e-5)
        assert page.data["orders"]["article"] is None

    def test_effects_of_pairs(self, page, clean):
        pairs, found = fc.enumerate_paths(3, 4, 2), page.data["pairs"]
        effects, targets = unpacked(found["effects"]), clean.tokens[:, 1:, None]

        def losses(logits):
            return -logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]

        rise = unpacked(found["rise"])
        assert len(rise) == len(pairs) == len(found["kept"])
        for row, pair in list(enumerate(found["kept"]))[::7]:
            plain = losses(clean.logits() - fc.path_logits(clean, pairs[pair])) - losses(clean.logits())
            assert torch.allclose(effects[row], plain, rtol=1e-3, atol=1e-5)
            assert float(rise[pair]) == pytest.approx(float(plain.mean()), rel=2e-3, abs=1e-6)
        order = rise[found["kept"]].abs()
        assert (order[:-1] >= order[1:] - 1e-6).all()

    def test_virtual_heads(self, page, weights):
        found, pairs = page.data["composition"]["virtual"], fc.enumerate_paths(3, 4, 2)
        for row in range(0, len(found["kept"]), 9):
            first, second = pairs[found["kept"][row]]
            values = [weights.head("W_V", *head) @ weights.head("W_O", *head) for head in (first, second)]
            table = weights.W_E @ values[0] @ values[1] @ weights.W_U
            eigenvalues = torch.linalg.eigvals(table)
            plain = float(eigenvalues.real.sum() / eigenvalues.abs().sum())
            assert found["positivity"][row] == pytest.approx(plain, abs=1e-4)
            best = (table - table.mean(1, keepdim=True)).flatten().sort(descending=True).values[:6]
            assert torch.allclose(torch.tensor([x[2] for x in found["entries"][row]]).double(), best, rtol=1e-5)

    def test_patterns_and_the_lengths_of_values(self, page, weights, clean):
        found = page.data["attention"]["text"]
        patterns, lengths = unpacked(found["patterns"]), unpacked(found["values"])
        rows, columns = torch.tril_indices(13, 13)
        for i, (layer, head) in enumerate(page.data["heads"]):
            plain = clean.pattern(layer)[:, head]
            assert (patterns[:, i] - plain[:, rows, columns]).abs().max() <= 0.5 / 255 + 1e-9
            stream = clean.streams[layer]
            read = stream / (stream.square().mean(-1, keepdim=True) + weights.eps).sqrt()
            values = read @ weights.W_V[layer, head // 2] + weights.b_V[layer, head // 2]
            assert torch.allclose(lengths[:, i], values.norm(dim=-1), rtol=1e-3)

    def test_repeated_random_tokens_show_the_best_induction_head_first(self, page, weights):
        found = page.data["attention"]["repeated"]
        (row,), copy = found["tokens"], found["copy"]
        assert len(row) == 2 * copy + 1
        assert row[1 : copy + 1] == row[copy + 1 :]
        assert len(set(row)) == copy + 1
        patterns, rows = (
            unpacked(found["patterns"])[0],
            [q * (q + 1) // 2 + q - copy + 1 for q in range(copy + 1, 2 * copy + 1)],
        )
        strength = patterns[:, rows].mean(-1)
        assert (strength[:-1] >= strength[1:] - 1 / 255).all()

    def test_attribution_adds_up_to_the_logit(self, page, clean):
        values = unpacked(page.data["attribution"]["values"]).sum(0)
        logits = clean.logits()[:, :-1]
        plain = logits.gather(-1, clean.tokens[:, 1:, None])[..., 0] - logits.mean(-1)
        assert torch.allclose(values[:, : plain.shape[1]], plain, atol=5e-3)

    def test_skip_trigrams(self, page, weights):
        raw = [entry if isinstance(entry, str) else entry[0] for entry in page.data["pieces"]]
        words = HOSTILE + [f"a{i}" for i in range(len(HOSTILE), 97)]
        head = page.data["heads"].index([1, 2])
        plain = fc.skip_trigrams(weights, (1, 2), k=40).top(40)
        found = page.data["trigrams"]["heads"][head]["best"]
        assert [[raw[i] for i in row[:3]] for row in found] == [[words[t] for t in x[:3]] for x in plain]
        assert [row[4] for row in found] == pytest.approx([x.logit for x in plain], rel=1e-5)


class TestModels:
    @pytest.mark.parametrize("layers", [0, 1])
    def test_sections_that_do_not_apply_say_so(self, layers, tmp_path):
        page = Page(fc.report(random_weights(layers), random_tokens(), out=tmp_path / "r.html"))
        assert f"The model has {layers} layer{'s' * (layers != 1)} of attention heads" in page.text
        assert page.data["pairs"] is None
        assert page.data["composition"] is None
        assert page.data["trigrams"]["bigrams"]["best"]
        assert (page.data["attention"] is None) == (layers == 0)
        assert page.data["attribution"]["labels"][0] == "embed"

    @pytest.mark.parametrize("norm", [None, "layernorm"])
    @pytest.mark.parametrize("positional", ["none", "rotary"])
    def test_kinds_of_models(self, norm, positional, tmp_path):
        weights = random_weights(2, norm=norm, positional=positional, biases=norm is None, dtype=torch.float32)
        page = Page(fc.report(weights, random_tokens(1, 5)[0], out=tmp_path / "r.html"))
        assert all(page.data[name] is not None for name in ("pairs", "composition", "spectra", "scores"))
        assert "5 tokens" in page.text

    def test_what_has_no_room_is_left_out_and_said(self, weights, ids, tmp_path, monkeypatch):
        monkeypatch.setattr(study, "HEADS", 6)
        monkeypatch.setattr(sections, "EFFECTS", 100)
        monkeypatch.setattr(sections, "PATTERNS", 700)
        page = Page(fc.report(weights, ids, out=tmp_path / "r.html"))
        assert len(page.data["heads"]) == 6
        ablated = fc.head_ablation(fc.trace(weights, ids)).delta.abs().flatten()
        assert {layer * 4 + head for layer, head in page.data["heads"]} == set(
            ablated.argsort(descending=True)[:6].tolist()
        )
        assert unpacked(page.data["pairs"]["effects"]).shape[0] == 2
        assert unpacked(page.data["attention"]["text"]["patterns"]).shape[0] == 1
        said = page.content[page.content.index('<ul id="cuts">') :]
        for words in ("show the 6 whose", "of the 2 pairs", "first 1 of 3", "Direct logit attribution shows the 3 of"):
            assert words in said
        labels, values = page.data["attribution"]["labels"], unpacked(page.data["attribution"]["values"])
        assert labels[-1] == "all others"
        whole = fc.direct_logit_attribution(fc.trace(weights, ids), center=True, per_token=True).values.sum(0)
        assert torch.allclose(values.sum(0)[:, :12], whole[:, :12], atol=1e-2)


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "error", "said"),
        [
            ({"length": 1}, ValueError, "length is 1, expected at least 2"),
            ({"sequences": 0}, ValueError, "sequences is 0, expected at least 1"),
            ({"text": "a"}, ValueError, "text is given, but tokens are too"),
            ({"tokenizer": 3}, TypeError, "tokenizer is 3, expected"),
            ({"out": "/nowhere/at/all.html"}, ValueError, "out is '/nowhere/at/all.html', expected a file"),
            ({"out": "."}, ValueError, "out is '.', expected a file"),
            ({"tokens": torch.tensor([[1, 999]])}, IndexError, "tokens[0, 1] is 999"),
            ({"model": 3}, TypeError, "model is 3"),
        ],
    )
    def test_by_name(self, given, error, said, weights, tmp_path):
        call = {"model": weights, "tokens": random_tokens(), "out": tmp_path / "r.html", **given}
        with pytest.raises(error, match=re.escape(said)):
            fc.report(call.pop("model"), **call)
        assert not list(tmp_path.iterdir())

    def test_text_without_a_tokenizer(self, weights, tmp_path):
        with pytest.raises(ValueError, match="no tokenizer"):
            fc.report(weights, text="once upon a time", out=tmp_path / "r.html")

    def test_two_vocabularies(self, tmp_path):
        with pytest.raises(ValueError, match="d_vocab_out is 50"):
            fc.report(random_weights(2, predicted=50), random_tokens(), out=tmp_path / "r.html")


class TestCommand:
    def test_a_page_of_a_text(self, worded, tmp_path):
        file, text = tmp_path / "r.html", tmp_path / "a 'text'.txt"
        text.write_text(" ".join(f"a{i}" for i in range(1, 97)))
        found = run(
            "report", worded, "--text", text, "--length", 9, "--sequences", 2, "--out", file, "--json", "--quiet"
        )
        assert found.exit_code == 0, found.output
        assert json.loads(found.output)["files"] == [str(file)]
        page = Page(file)
        assert str(text) in page.text
        assert str(worded) in page.text
        raw = [entry if isinstance(entry, str) else entry[0] for entry in page.data["pieces"]]
        assert [[raw[i] for i in row][:2] for row in page.data["tokens"]] == [["[START]", "a1"], ["[START]", "a89"]]

    def test_files_that_are_no_report_are_kept(self, model, tokens, tmp_path):
        file = tmp_path / "r.html"
        file.write_text("mine")
        call = ("report", model, "--tokens", tokens, "--length", 4, "--out", file)
        assert "is there and is no report" in refused(*call)
        assert file.read_text() == "mine"
        assert run(*call, "--force").exit_code == 0
        assert run(*call).exit_code == 0
        assert Page(file).data["words"] is False

    def test_every_step_is_counted(self, weights, ids, tmp_path):
        for model in (weights, random_weights(1), random_weights(0)):
            done = []
            fc.report(model, ids, out=tmp_path / "r.html", progress=done.append)
            assert sum(done) == pytest.approx(sum(make.report_steps(model).values()))

    @pytest.mark.parametrize(
        "given", [("--text", "none.txt"), ("--tokens", "none.npy"), ("--text", "a", "--tokens", "b")]
    )
    def test_bad_input_by_its_option(self, given, model, tmp_path):
        assert given[0] in refused("report", model, *given, "--out", tmp_path / "r.html")
