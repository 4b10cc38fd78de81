"""Corpora are read as their plain packing says, a few sequences at a time; and a sweep ends when its ranking is settled."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.sweeps import documents
from pyfastcircuits.sweeps import work as works
from pyfastcircuits.sweeps.ranking import FIRST, Ranking, half_width

DOCUMENTS = [[5, 6, 7], [], [8] * 9, list(range(40)), [1]]


def whole(found, step=3):
    """All of a corpus, some sequences at a time."""
    blocks, start = [], 0
    while len(block := found.read(start, start + step)):
        blocks.append(block)
        start += len(block)
    return torch.cat(blocks)


def packed(documents, length, lead=()):
    """The plain form: one after the other, cut, each cut behind what leads."""
    ids = [x for document in documents for x in document]
    width = length - len(lead)
    return torch.tensor([[*lead, *ids[i : i + width]] for i in range(0, len(ids) - width + 1, width)])


def dataset(folder, name="input_ids", rows=DOCUMENTS, files=2):
    """What datasets.Dataset.save_to_disk writes: Arrow streams, and state.json that lists them."""
    folder.mkdir()
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    cut = -(-len(rows) // files)
    for i, file in enumerate(names):
        table = pa.table({name: rows[i * cut : (i + 1) * cut]})
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def written(folder, kind):
    """DOCUMENTS as one kind of corpus of tokens."""
    if kind == "dataset":
        return dataset(folder / "set")
    if kind == "parquet":
        pq.write_table(pa.table({"other": ["x"] * 5, "tokens": DOCUMENTS}), folder / "c.parquet", row_group_size=2)
        return folder / "c.parquet"
    if kind == "folder":
        (folder / "parts").mkdir()
        for i in range(5):
            pq.write_table(pa.table({"tokens": [DOCUMENTS[i]]}, pa.schema({"tokens": pa.list_(pa.int64())})),
                           folder / "parts" / f"{i}.parquet")  # fmt: skip
        (folder / "parts" / ".hidden").write_text("x")
        return folder / "parts"
    (folder / "c.jsonl").write_text("\n".join(json.dumps({"input_ids": x, "text": "no"}) for x in DOCUMENTS) + "\n\n")
    return folder / "c.jsonl"


@pytest.mark.parametrize("kind", ["dataset", "parquet", "folder", "jsonl"])
@pytest.mark.parametrize("length", [2, 7])
def test_tables_of_tokens(kind, length, tmp_path):
    path = written(tmp_path, kind)
    found = fc.corpus(path, length)
    assert found.count is None
    expected = packed(DOCUMENTS, length)
    assert torch.equal(whole(found), expected)
    assert torch.equal(found.read(2, 4), expected[2:4])  # goes back
    assert torch.equal(found.read(5, 6), expected[5:6])  # leaves some out
    assert found.read(99, 101).shape == (0, length)
    assert torch.equal(whole(fc.corpus(path, length, sequences=4)), expected[:4])


def test_arrays_are_mapped(tmp_path):
    rows = random_tokens(6, 10)
    np.save(tmp_path / "rows.npy", rows.numpy().astype(np.int32))
    np.save(tmp_path / "flat.npy", rows.flatten().numpy())
    rows.flatten().numpy().astype(np.uint16).tofile(tmp_path / "two.bin")
    rows.flatten().numpy().astype(np.uint32).tofile(tmp_path / "four.bin")
    found = fc.corpus(tmp_path / "rows.npy", 7)
    assert (found.count, found.length) == (6, 7)
    assert torch.equal(whole(found), rows[:, :7])
    for name, dtype in (("flat.npy", "uint16"), ("two.bin", "uint16"), ("four.bin", "uint32")):
        found = fc.corpus(tmp_path / name, 7, dtype=dtype, sequences=5)
        assert found.count == 5
        assert torch.equal(whole(found), packed(rows.tolist(), 7)[:5])
        assert torch.equal(found.read(3, 5), packed(rows.tolist(), 7)[3:5])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "dataset"])
def test_texts_follow_their_start_tokens(kind, tmp_path, worded, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 12)
    monkeypatch.setattr(documents, "ROWS", 2)
    texts = ["a1 a2 a3\n", "a4 a5\na6 a7 a8 a9\na10", "", "a11 a12 a13 a14"]
    ids = [[int(word[1:]) for word in text.split()] for text in texts]
    if kind == "txt":
        (tmp_path / "t").mkdir()
        for i, text in enumerate(texts):
            (tmp_path / "t" / f"{i}.txt").write_text(text)
        path = tmp_path / "t"
    elif kind == "dataset":
        path = dataset(tmp_path / "set", "text", texts)
    else:
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = packed([[0, *x] for x in ids], 5, [0])
    assert len(expected) == 4
    assert torch.equal(whole(fc.corpus(path, 5, tokenizer=worded)), expected)


BAD = {
    "length": (lambda f: fc.corpus(f / "t.txt", 1), "length is 1, expected at least 2"),
    "sequences": (lambda f: fc.corpus(f / "t.txt", 4, sequences=0), "sequences is 0, expected at least 1"),
    "tokenizer": (lambda f: fc.corpus(f / "t.txt", 4), "tokenizer is missing, but t.txt holds texts"),
    "no tokenizer": (lambda f: fc.corpus(f / "t.txt", 4, tokenizer=f), "tokenizer is '.*', which has no tokenizer.json"),
    "column": (lambda f: fc.corpus(f / "c.jsonl", 4), "column is None, expected one of input_ids, tokens, text of a, b"),
    "its column": (lambda f: fc.corpus(f / "c.jsonl", 4, column="c"), "column is 'c', expected 'c' of a, b"),
    "no JSON": (lambda f: whole(fc.corpus(f / "c.jsonl", 4, column="a")), "line 2 is no JSON"),
    "a text": (lambda f: whole(fc.corpus(f / "d.jsonl", 2)), "rows 0 to 255 have 'x' in 'tokens', expected lists of tokens"),
    "an id": (lambda f: whole(fc.corpus(f / "e.jsonl", 2)), "rows 0 to 255 have -1 in 'tokens', expected tokens, integers from 0"),
    "kinds": (lambda f: fc.corpus(f, 4), r"which has files of .*, expected one kind"),
    "array": (lambda f: fc.corpus(f / "f.npy", 2), r"holds float64 of shape \[3\], expected integers"),
    "short": (lambda f: fc.corpus(f / "g.npy", 9), r"length is 9, but g.npy has shape \[2, 3\]: it gives no sequence"),
    "parquet": (lambda f: fc.corpus(f / "h.parquet", 9), "which is not readable"),
    "splits": (lambda f: fc.corpus(f / "dict", 9), "which has several data sets: give one of train, test in it"),
}  # fmt: skip


def test_bad_corpora_are_named(tmp_path):
    (tmp_path / "t.txt").write_text("a1")
    (tmp_path / "c.jsonl").write_text('{"a": [1], "b": 2}\n{')
    (tmp_path / "d.jsonl").write_text('{"tokens": [1]}\n{"tokens": "x"}')
    (tmp_path / "e.jsonl").write_text('{"tokens": [1, -1]}')
    np.save(tmp_path / "f.npy", np.zeros(3))
    np.save(tmp_path / "g.npy", np.zeros((2, 3), int))
    (tmp_path / "h.parquet").write_text("no")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for call, says in BAD.values():
        with pytest.raises(ValueError, match=says):
            call(tmp_path)
    with pytest.raises(FileNotFoundError):
        fc.corpus(tmp_path / "nowhere", 4)


def test_a_fingerprint_is_of_content_and_of_how_it_is_read(tmp_path):
    tokens = np.arange(3_000_000, dtype=np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    first = fc.corpus(tmp_path / "a.bin", 9).fingerprint
    assert fc.corpus(tmp_path / "a.bin", 9).fingerprint == first
    assert fc.corpus(tmp_path / "a.bin", 8).fingerprint != first
    for place in (0, -1):
        changed = tokens.copy()
        changed[place] += 1
        changed.tofile(tmp_path / "a.bin")
        assert fc.corpus(tmp_path / "a.bin", 9).fingerprint != first


def test_a_corpus_is_never_in_memory(tmp_path):
    pq.write_table(pa.table({"tokens": [[7] * 2000] * 1500}), tmp_path / "c.parquet", row_group_size=100)
    found = fc.corpus(tmp_path / "c.parquet", 100)
    tracemalloc.start()
    assert found.read(25_000, 25_003).shape == (3, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # of 24 MB as int64


WEIGHTS = random_weights(2, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
@pytest.mark.parametrize("mode", ["zero", "resample"])
def test_a_sweep_over_a_corpus_is_the_sweep_over_its_tokens(kind, mode, tmp_path, monkeypatch):
    """Where nobody knows how many sequences there are, the first is resampled from the second."""
    monkeypatch.setattr(works, "WORK", {"cpu": 1e6})
    tokens = random_tokens(7, 12)
    if kind == "npy":
        np.save(tmp_path / "c.npy", tokens.numpy())
    else:
        (tmp_path / "c.jsonl").write_text(json.dumps({"tokens": tokens.flatten().tolist()}))
    found = fc.sweep(WEIGHTS, fc.corpus(tmp_path / f"c.{kind}", 12), mode=mode, out=tmp_path / "out")
    if mode == "zero" or kind == "npy":
        expected = fc.sweep(WEIGHTS, tokens, mode=mode).result
    else:
        reference = fc.trace(WEIGHTS, torch.cat((tokens[1:2], tokens[:-1])))
        expected = fc.pair_ablation(fc.trace(WEIGHTS, tokens), mode=mode, reference=reference, kl=True)
    assert found.sequences == 7
    torch.testing.assert_close(found.result.delta.float(), expected.delta, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(works.Work, "run", pytest.fail)
    again = fc.sweep(WEIGHTS, fc.corpus(tmp_path / f"c.{kind}", 12), mode=mode, out=tmp_path / "out", resume=True)
    assert torch.equal(again.result.delta, found.result.delta)


def test_a_token_that_the_model_has_not_is_named(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"tokens": [*range(90), 97, *range(8)]}))
    with pytest.raises(IndexError, match=r"tokens\[10, 0\] is 97, expected 0 to 96 \(of sequences 0 to 10\)"):
        fc.sweep(WEIGHTS, fc.corpus(tmp_path / "c.jsonl", 9))


class TestRanking:
    """Effects of six experiments: skewed, and moved together by how hard a sequence is."""

    MEANS = torch.tensor([1.0, 0.9, 0.8, 0.4, 0.3, 0.2], dtype=torch.float64)

    def effects(self, count, generator, means=MEANS):
        hard = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        own = torch.randn(count, len(means), generator=generator, dtype=torch.float64)
        return means + 2 * hard + (0.5 * own).exp()

    def ended(self, effects, n, confidence, step=8):
        ranking = Ranking(n, confidence, effects.shape[1])
        for start in range(0, len(effects), step):
            ranking.add(effects[start : start + step])
            if ranking.settled:
                return start + step
        return None

    def test_it_stops_wrongly_less_often_than_it_says(self):
        """Two experiments that matter alike have no order: a test that looks after each few sequences is fooled by
        chance, unless it is made for it.
        """
        generator = torch.Generator().manual_seed(0)
        tied = torch.tensor([1.0, 0.5, 0.5, 0.1], dtype=torch.float64)
        wrong = naive = 0
        for _ in range(100):
            effects = self.effects(1000, generator, tied)
            wrong += self.ended(effects, 2, 0.9, 20) is not None
            gap = effects[:, 1] - effects[:, 2]
            counts = torch.arange(1, 1001)
            mean = gap.cumsum(0) / counts
            deviation = ((gap.square().cumsum(0) / counts) - mean.square()).sqrt()
            naive += bool((mean.abs() > 1.645 * deviation / counts.sqrt())[FIRST::20].any())
        assert wrong <= 10
        assert naive > 25

    def test_it_stops_as_soon_as_differences_allow(self):
        generator = torch.Generator().manual_seed(1)
        stops = {scale: [] for scale in (1.0, 2.0, 4.0)}
        for scale, ends in stops.items():
            for _ in range(5):
                effects = self.effects(6000, generator, self.MEANS * scale)
                ends.append(self.ended(effects, 3, 0.95))
                order = effects[: ends[-1]].mean(0).sort(descending=True).indices[:3]
                assert order.tolist() == [0, 1, 2]
        assert max(stops[4.0]) < min(stops[2.0]) < max(stops[2.0]) < min(stops[1.0])
        assert max(stops[4.0]) < 400

    def test_what_moves_all_experiments_does_not_count(self):
        """The deviation of an effect is 2; that of a difference of two is 0.9."""
        effects = self.effects(6000, torch.Generator().manual_seed(2))
        end = self.ended(effects, 3, 0.95)
        alone = half_width(end, 0.05 / 36) * effects[:end].std(0)
        assert (alone > 0.1).all()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_experiments_that_come_in_late_are_seen(self, sign):
        """One that is no candidate by the first sequences keeps the ranking open, and so do equal ones."""
        effects = torch.linspace(1, 0, 40, dtype=torch.float64).repeat(200, 1)
        noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        effects = sign * (effects + 1e-3 * noise)
        settled, late = Ranking(2, 0.95, 40, sign), Ranking(2, 0.95, 40, sign)
        settled.add(effects)
        assert settled.settled
        effects[FIRST:, 39] += 100 * sign
        late.add(effects)
        assert not late.settled
        equal = Ranking(2, 0.95, 3, sign)
        equal.add(torch.tensor([2.0, 1.0, 1.0]).repeat(200, 1) * sign)
        assert not equal.settled

    def test_sequences_that_measure_nothing_do_not_count(self):
        ranking = Ranking(1, 0.95, 2)
        ranking.add(torch.tensor([2.0, torch.nan]).repeat(500, 1))
        assert not ranking.settled
        assert ranking.count == 0

    def test_intervals_are_those_of_the_paper(self):
        """Theorem 2.2, written out; at one time alone an interval would be narrower."""
        for t, alpha in ((40, 0.05), (1000, 0.001)):
            rho = ((-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / 128) ** 0.5
            expected = np.sqrt(2 * (t * rho**2 + 1) / (t**2 * rho**2) * np.log(np.sqrt(t * rho**2 + 1) / alpha))
            assert half_width(t, alpha) == pytest.approx(expected)
        fixed = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - 0.025)) / 40**0.5
        assert 1 < half_width(40, 0.05) / float(fixed) < 2

    def test_a_sweep_ends_when_its_ranking_is_settled(self, tmp_path, monkeypatch):
        monkeypatch.setattr(works, "WORK", {"cpu": 4e6})
        tokens = random_tokens(400, 8)
        found = fc.sweep(WEIGHTS, tokens, "layer", settle=1, confidence=0.9, out=tmp_path)
        assert found.settled
        assert 2 * FIRST <= found.sequences < 400
        expected = fc.sweep(WEIGHTS, tokens[: found.sequences], "layer").result
        torch.testing.assert_close(found.result.delta.float(), expected.delta, rtol=1e-4, atol=1e-6)
        again = fc.sweep(WEIGHTS, tokens, "layer", settle=1, confidence=0.9, out=tmp_path, resume=True)
        assert again.sequences == found.sequences
        further = fc.sweep(WEIGHTS, tokens, "layer", out=tmp_path, resume=True)
        assert further.sequences == 400
        assert torch.equal(again.result.delta, found.result.delta)
