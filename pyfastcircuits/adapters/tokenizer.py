"""The tokenizer.json beside a model: texts to tokens, by the tokenizers library."""

from pathlib import Path
from typing import Any

from pyfastcircuits.adapters.files import model_folder

START = "[START]"


def tokenizer_file(name_or_path: str | Path) -> Path:
    """Where a model's tokenizer is, if it has one; errors as model_folder."""
    return model_folder(name_or_path) / "tokenizer.json"


def read_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizers.Tokenizer of a model; None where it has none.

    Raises:
        ValueError: tokenizer.json is not one.
        FileNotFoundError: there is no such model.
        ImportError: the tokenizers package is missing.
    """
    file = tokenizer_file(name_or_path)
    if not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("reading texts needs tokenizers: pip install 'pyfastcircuits[cli]'") from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from error


def start_token(tokenizer: Any) -> int | None:
    """The token that every sequence begins with: the tokenizer's own start token or [START]; None without both."""
    put_in_front: list[int] = tokenizer.encode("").ids
    if put_in_front:
        return put_in_front[0]
    found: int | None = tokenizer.token_to_id(START)
    return found
