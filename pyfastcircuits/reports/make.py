"""`fc.report`: the report of a model as one HTML file."""

import os
import platform
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.files import load_model
from pyfastcircuits.adapters.texts import TokenText, check_known, evenly, held_out_text, sequences_of
from pyfastcircuits.adapters.tokens import checked_tokens
from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.arguments import describe, public
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend
from pyfastcircuits.ops.library import build_info
from pyfastcircuits.reports import sections
from pyfastcircuits.reports.pack import Pieces, rounded
from pyfastcircuits.reports.page import check_can_be_made, page
from pyfastcircuits.reports.sections import Section
from pyfastcircuits.reports.study import HEADS, Study, positions
from pyfastcircuits.reports.vocabulary import trigrams
from pyfastcircuits.sweeps.identity import model_hash, tokens_hash

LENGTH, SEQUENCES = 64, 16
_WORK = 2e12  # multiply-adds that the ablation of all pairs may take, unless `sequences` says otherwise


@public
@torch.no_grad()
def report(
    model: Any,
    tokens: Tensor | None = None,
    *,
    text: str | None = None,
    out: str | Path = "report.html",
    tokenizer: Any = None,
    name: str | None = None,
    length: int | None = None,
    sequences: int | None = None,
    source: str | None = None,
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Write one HTML page with the figures of the article for this model, to be opened from the file, offline.

    Its nine sections are term importance, the ablation of all pairs of heads, composition and virtual heads,
    eigenvalues, skip-trigrams, attention patterns, head scores, direct logit attribution, and what made the page. One
    that does not apply to the model says so. A page has room for some megabytes: what is left out of a large model is
    said on it.

    Args:
        model: the name of a bundled model, a safetensors file or a folder, as for load_weights; CircuitWeights; or a
            model of another library, as for trace.
        tokens: [B, T] or [T], what the model runs over.
        text: what it runs over instead, cut into sequences that start with the tokenizer's start token. Without tokens
            and text, it is the held-out files of Python's standard library.
        out: the file to write, which is overwritten.
        tokenizer: of the tokenizers library, or a fast one of Hugging Face. None: the tokenizer.json beside the model,
            or the tokenizer that a TransformerLens model carries. Without any, tokens are shown as ids.
        name: what the page calls the model. None: its name or path, or its class.
        length: tokens a sequence, at most. None: 64, or what the model has positions for.
        sequences: at most so many, evenly spaced. None: 16, fewer where all pairs of a large model would take long.
        source: where the tokens come from, in words, for the page.
        backend: which kernels run, see pyfastcircuits.ops.
        progress: called with the number of steps finished since the last call, which add up to `report_steps`.

    Returns:
        The file.

    Raises:
        ImportError: the `report` extra is missing.
        TypeError: a model, tokens or tokenizer of another type.
        ValueError: tokens and text are both given; a length below 2 or fewer than one sequence; neither a text nor a
            tokenizer for it; a model that predicts other tokens than it reads; else as trace.
        OSError: the file cannot be written.

    Source: "A Mathematical Framework for Transformer Circuits", Elhage et al. 2021.
    """
    begun = time.perf_counter()
    check_can_be_made()
    for argument, value, least in (("length", length, 2), ("sequences", sequences, 1)):
        if value is not None and value < least:
            raise ValueError(f"{argument} is {value}, expected at least {least}")
    if tokens is not None and text is not None:
        raise ValueError("text is given, but tokens are too: give one of them")
    file = Path(out)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"out is {describe(str(out))}, expected a file in a folder that there is")
    named = isinstance(model, (str, Path))
    runs = load_model(model, torch.float32).to(_device(backend)) if named else model
    shown = _token_text(model if named else None, runs, tokenizer)
    weights = runs if isinstance(runs, CircuitWeights) else CircuitWeights.from_model(runs)
    weights.check_one_vocabulary("a report is of models that predict the next token")
    most = sequences or _affordable(weights, length or LENGTH)
    rows, drawn = _rows(tokens, text, shown, weights, min(length or LENGTH, positions(runs, weights) or LENGTH), most)
    run = trace(runs, rows.to(weights.device), weights=weights)
    advance = progress or (lambda steps: None)
    advance(1)
    study = Study(runs, weights, shown, run, backend, advance, Pieces(shown))
    found = _sections(study)
    facts = {
        "model": name or (str(model) if named else type(model).__name__),
        "model_sha256": model_hash(run),
        "text": source or drawn,
        "tokens_sha256": tokens_hash(rows),
        "options": f"{rows.shape[0]} sequences of {rows.shape[1]} tokens, backend {backend}",
        "versions": _versions(),
        "machine": _machine(weights),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "seconds": f"{time.perf_counter() - begun:.1f}",
    }
    content = page(_shared(study), found, facts, study.cuts)
    _write(file, content)
    advance(1)
    return file


def _write(file: Path, content: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise OSError(f"out is {describe(str(file))}: it cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def report_steps(weights: CircuitWeights) -> dict[str, int]:
    """What the progress of a report adds up to, by phase."""
    layers, heads = weights.n_layers, min(HEADS, weights.n_layers * weights.n_heads)
    across = heads**2 * (layers - 1) // (2 * layers) if layers > 1 else 0
    return {
        "clean run": 1,
        "orders": 3 * layers + 3,
        "pairs": across,
        "composition": 4 * (across > 0),
        "eigenvalues": int(layers > 0),
        "tables": heads + 1,
        "attention": int(layers > 0),
        "head scores": int(layers > 0),
        "attribution": 1,
        "writing": 1,
    }


def _sections(study: Study) -> dict[str, Section]:
    """The sections by the name of their place on the page, in its order."""
    found = {name: getattr(sections, name)(study) for name in ("orders", "pairs", "composition", "spectra")}
    if study.weights.qk_norm == "of a run":
        found["trigrams"] = Section(None, "Queries and keys come through norms that these weights do not hold.")
    else:
        said = "The largest skip-trigrams and bigrams are listed, by head; a search finds those with a token."
        found["trigrams"] = Section(trigrams(study), said)
    return found | {name: getattr(sections, name)(study) for name in ("attention", "scores", "attribution")}


def _shared(study: Study) -> dict[str, Any]:
    """What several sections read: heads, tokens, losses."""
    tokens = study.pieces(study.run.tokens)
    return {
        "words": study.text.tokenizer is not None,
        "heads": [list(head) for head in study.heads],
        "tokens": tokens,
        "losses": rounded(study.run.token_losses),
        "pieces": study.pieces.shown,
    }


def _token_text(named: str | Path | None, runs: Any, tokenizer: Any) -> TokenText:
    """The tokenizer that is given, or the model's own."""
    given = getattr(runs, "tokenizer", None) if tokenizer is None and named is None else tokenizer
    inner = getattr(given, "backend_tokenizer", given)
    if inner is not None and not hasattr(inner, "encode_batch"):
        if tokenizer is None:  # a slow one, which a model happens to carry
            return TokenText(None)
        raise TypeError(f"tokenizer is {describe(tokenizer)}, expected one of tokenizers or a fast Hugging Face one")
    return TokenText(named, inner)


def _device(backend: Backend) -> str:
    """Where a model that is given by its name runs."""
    on_gpu = backend in ("triton", "cuda") or (backend == "auto" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


def _rows(
    tokens: Tensor | None, text: str | None, shown: TokenText, weights: CircuitWeights, length: int, most: int
) -> tuple[Tensor, str]:
    """The tokens [B, T] that the model runs over, and where they come from."""
    if tokens is not None:
        rows = checked_tokens(weights, tokens.to(weights.device))[:, :length]
        return evenly(rows.cpu(), most).contiguous(), "tokens that were given"
    given = "a text that was given" if text is not None else "held-out files of Python's standard library"
    rows = sequences_of(shown, held_out_text() if text is None else text, length, most)
    unknown = check_known(rows, shown, weights.d_vocab)
    if unknown > 0.01:
        warnings.warn(f"text: {unknown:.0%} of its tokens are unknown to the model's tokenizer", stacklevel=3)
    return rows.contiguous(), given


def _affordable(weights: CircuitWeights, length: int) -> int:
    """How many sequences the ablation of all pairs is made over, unless the user says."""
    heads = min(HEADS, weights.n_layers * weights.n_heads)
    each = heads**2 / 2 * length * weights.d_vocab_out * weights.d_value
    return max(1, min(SEQUENCES, int(_WORK / max(each, 1))))


def _versions() -> str:
    from importlib.metadata import version

    facts = build_info()
    names = ("jinja2", "plotly")
    return ", ".join(
        [
            f"pyfastcircuits {facts['version']}",
            f"torch {torch.__version__}",
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in names),
        ]
    )


def _machine(weights: CircuitWeights) -> str:
    facts = build_info()
    device = facts["gpu"] if weights.device.type == "cuda" else f"CPU tier {facts['cpu_tier']}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}, {facts['threads']} threads"
