"""The snippets of README and docs that need TransformerLens, on a small random model in the place of GPT-2, or transformers."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")
transformers = pytest.importorskip("transformers")

from support.pages import blocks  # noqa: E402
from test_docs import PAGES, ROOT  # noqa: E402

import pyfastcircuits as fc  # noqa: E402


def small_model(folder):
    """Two layers with MLPs, and the tokenizer of the bundled models."""
    file = ROOT / "pyfastcircuits" / "models" / "induction-2l" / "tokenizer.json"
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "[START]")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **special).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 64, "d_head": 4, "n_heads": 4, "d_vocab": 4096, "d_mlp": 32}
    cfg = lens.HookedTransformerConfig(**sizes, act_fn="gelu", device="cpu", seed=0)
    return lens.HookedTransformer(cfg, tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore")
def test_snippets_that_need_transformer_lens_run(monkeypatch, tmp_path):
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    monkeypatch.setattr(lens.HookedTransformer, "from_pretrained", lambda name: small_model(tmp_path))
    pages = {page: [x.code for x in blocks(page) if x.needs == "transformer-lens"] for page in PAGES}
    assert sum(map(len, pages.values())) >= 3
    for page, marked in pages.items():
        names = {"fc": fc, "torch": torch}
        for code in marked:
            exec(compile(code, page.name, "exec"), names)
        if "again" in names:
            assert torch.allclose(names["trace"].loss, names["again"].loss)
        if "rows" in names:
            assert names["rows"].shape[0] == 3
            assert names["rows"].isfinite().all()


def test_snippets_that_need_transformers_run():
    pages = {page: [x.code for x in blocks(page) if x.needs == "transformers"] for page in PAGES}
    assert sum(map(len, pages.values())) >= 3
    for page, marked in pages.items():
        names = {}
        for code in marked:
            exec(compile(code, page.name, "exec"), names)
