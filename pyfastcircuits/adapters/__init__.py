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
