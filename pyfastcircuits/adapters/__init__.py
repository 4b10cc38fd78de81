"""Models of other libraries, exactly: their weights as circuits, and their own forward pass frozen.

| library | models |
|---|---|
| TransformerLens | HookedTransformer (up to 3.9), TransformerBridge (from 4) |
| Hugging Face transformers | the families in `families`, with their variants in docs/models.md |

A frozen run holds patterns and norm scales as the model computed them, and what is computed anew goes through the
model's own modules, so everything that only shapes a pattern (windows, rotary settings, caps of scores, norms of
queries and keys, padding) needs no adapter. An adapter says where a family keeps the weights of its heads, norms and
embeddings, and which of its modules is what; `trace` checks every run: what the embedding, the heads, the final norm
and the logits are by the weights must be what they are in the model. CONTRIBUTING.md tells how to add a family.

Each library is imported by whoever has made the model; nothing here imports one.
"""
