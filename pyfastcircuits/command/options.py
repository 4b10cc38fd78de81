"""The options that several commands share, and what they mean."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import pyfastcircuits as fc
from pyfastcircuits import ops
from pyfastcircuits.adapters.files import BUNDLED, load_model
from pyfastcircuits.adapters.texts import TokenText
from pyfastcircuits.command.guard import GIVES as GIVES
from pyfastcircuits.run.nodes import Head

MODEL = "a bundled model, a safetensors file or its folder, or the local folder of a Hugging Face model"
READS, HOW = "What it reads", "How it computes"  # groups of options in the help, beside GIVES
MOST, LONGEST = "how many sequences, at most", "how many tokens in a sequence, at most"


def _bundled(incomplete: str) -> list[str]:
    return [name for name in BUNDLED if name.startswith(incomplete)]


Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=MODEL, show_default="induction-2l", autocompletion=_bundled),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="the same, by name", rich_help_panel=READS, autocompletion=_bundled),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="a text to run the model over, in UTF-8",
        show_default="files of Python's standard library",
        rich_help_panel=READS,
    ),
]
TokensFile = Annotated[
    Path | None,
    typer.Option("--tokens", help="token ids in its place: .npy, or text, a sequence a line", rich_help_panel=READS),
]
Top = Annotated[int, typer.Option(min=0, help="how many findings to show, the largest first", rich_help_panel=GIVES)]
Out = Annotated[
    Path,
    typer.Option(help="folder to write to; of a report, also the name of its page, as x.html", rich_help_panel=GIVES),
]
Force = Annotated[
    bool, typer.Option("--force", help="overwrite files that another run has made", rich_help_panel=GIVES)
]
Seed = Annotated[int, typer.Option(help="of what is drawn at random", rich_help_panel=READS)]
Backend = Annotated[
    ops.Backend, typer.Option(help="which kernels compute; auto: those of the GPU if there is one", rich_help_panel=HOW)
]
Dtype = Annotated[
    Literal["float32", "float64", "bfloat16"], typer.Option(help="format of the weights' numbers", rich_help_panel=HOW)
]
Precision = Annotated[
    ops.Precision,
    typer.Option(help="of products; ieee: all digits of the numbers, the others: fewer", rich_help_panel=HOW),
]

Split = Annotated[
    Literal["auto", "none", "sequences", "experiments", "vocabulary"],
    typer.Option(help="by what the processes of torchrun share the work", rich_help_panel=HOW),
]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="never hold logits of all tokens at once", rich_help_panel=HOW)
]


def named(name: str | None, option: str | None) -> str:
    """The model's name.

    Raises:
        ValueError: it is given twice.
    """
    if name and option:
        raise ValueError(f"model is given twice, as {name!r} and --model {option!r}: give one of them")
    return name or option or "induction-2l"


def device_of(backend: ops.Backend, precision: ops.Precision = "ieee", dtype: str = "float32") -> str:
    """The device for a backend, and whether it can compute in a precision: asked before any work.

    Raises:
        ValueError, RuntimeError: this machine, build or device has no such backend or precision.
    """
    on_gpu = backend in ("triton", "cuda") or (backend == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    ops.resolve_backend(backend, torch.device(device))
    if precision != "ieee":
        nothing = torch.zeros(1, 1, 1, dtype=getattr(torch, dtype), device=device)
        ops.pair_norms(nothing, nothing, precision=precision, backend=backend)
    return device


def weights_of(name: str, dtype: str, device: str) -> fc.CircuitWeights:
    """A model's weights; errors as model_of."""
    return _checked(fc.load_weights(name).to(getattr(torch, dtype)).to(device))


def model_of(name: str, dtype: str, device: str) -> tuple[Any, fc.CircuitWeights]:
    """A model that runs, and its weights.

    Raises:
        ValueError: it predicts other tokens than it reads.
    """
    model = load_model(name, getattr(torch, dtype)).to(device)
    return model, _checked(model if isinstance(model, fc.CircuitWeights) else fc.CircuitWeights.from_model(model))


def _checked(weights: fc.CircuitWeights) -> fc.CircuitWeights:
    weights.check_one_vocabulary("the command is for models that predict the next token; others are asked from Python")
    return weights


def token_of(option: str, text: str, shown: TokenText, weights: fc.CircuitWeights) -> int:
    """The token that an option names.

    Raises:
        ValueError: it is no single token of the tokenizer and of the model.
    """
    try:
        token = shown.token(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error
    if token >= weights.d_vocab:
        raise ValueError(f"{option} {text!r} is token {token}, expected 0 to {weights.d_vocab - 1}")
    return token


def head_of(name: str) -> Head:
    """The head that --head names.

    Raises:
        ValueError: it is no LAYER.HEAD.
    """
    layer, dot, head = name.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal() and len(name) < 12):
        raise ValueError(f"--head is {name!r}, expected LAYER.HEAD, such as 1.4")
    return Head(int(layer), int(head))
