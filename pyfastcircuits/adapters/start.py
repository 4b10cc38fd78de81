"""The token that a model was trained to find in front of every sequence."""

from typing import Any


def start_of(model: Any, vocabulary: int) -> int | None:
    """A model's own start token (BOS) among the tokens it reads; None where it has none.

    TransformerLens says in `cfg.default_prepend_bos` whether sequences start with its tokenizer's; a Hugging Face model
    names it in `config` or in `generation_config`.
    """
    if hasattr(model, "cfg"):
        prepended = getattr(model.cfg, "default_prepend_bos", False)
        holders = [getattr(model, "tokenizer", None)] if prepended else []
    else:
        holders = [getattr(model, name, None) for name in ("config", "generation_config")]
    tokens = (getattr(holder, "bos_token_id", None) for holder in holders)
    return next((token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary), None)
