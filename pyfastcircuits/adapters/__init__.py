"""Models of other libraries, exactly: their weights as circuits, and their own forward pass frozen.

| library | models |
|---|---|
| TransformerLens | HookedTransformer (up to 3.9), TransformerBridge (from 4) |
| Hugging Face transformers | GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen 2, Qwen 3, Gemma 2 |

A frozen run holds patterns and norm scales as the model computed them, and reruns call the model's own modules as the
run did, so everything that only shapes a pattern (windows, rotary settings, caps of scores, norms of queries and keys,
padding) needs no adapter. Left to say is where a family keeps the weights of its heads, norms and embeddings, and which
of its modules is what.

To add a Hugging Face family: write `adapters/<model_type>.py` with a `FAMILY`, starting from the nearest one; add it
to `hugging_face.FAMILIES`; add its configurations to `tests/adapters/configurations.py`. `trace` checks every run:
what the heads write by the weights must be what the model's attention wrote. Where logits are not a linear map of the
final norm's output, or a layer holds more than one attention, refuse the option by name (`Checkpoint.refuse`).

Each library is imported by whoever has made the model; nothing here imports one.
"""

from typing import Any

from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.trace import FrozenTrace, checked_mask, checked_tokens

__all__ = ["trace_of", "weights_of"]


def weights_of(model: Any) -> CircuitWeights:
    """See CircuitWeights.from_model."""
    weights: CircuitWeights = _library(model).weights_of(model)
    return weights


def trace_of(model: Any, tokens: Tensor, mask: Tensor | None, store: str) -> FrozenTrace:
    """See pyfastcircuits.run.trace."""
    from pyfastcircuits.adapters.recording import freeze

    library = _library(model)
    weights = library.weights_of(model)
    tokens, mask = checked_tokens(weights, tokens), checked_mask(tokens, mask)
    return freeze(weights, tokens, mask, library.record(model, weights, tokens, mask, store))


def _library(model: Any) -> Any:
    """The adapter of the library a model is of, by what it offers."""
    if hasattr(model, "run_with_hooks") and hasattr(model, "cfg"):
        from pyfastcircuits.adapters import transformer_lens

        return transformer_lens
    if hasattr(getattr(model, "config", None), "model_type"):
        from pyfastcircuits.adapters import hugging_face

        return hugging_face
    raise TypeError(
        f"weights is a {type(model).__name__}, expected CircuitWeights, a TransformerLens model or a Hugging Face one"
    )
