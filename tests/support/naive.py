"""The model and the article's algorithms written out, with nothing shared with the library but the weights."""

import torch
from torch import Tensor

from pyfastcircuits import CircuitWeights


def norm(x: Tensor, w: CircuitWeights, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if w.norm is None:
        return x, torch.ones_like(x[..., :1])
    if w.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    if scale is None:
        scale = 1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + w.eps)
    return x * scale, scale


def rotate(x: Tensor, w: CircuitWeights) -> Tensor:
    out, half = x.clone(), w.rotary_dim // 2
    for t in range(x.shape[-2]):
        for i in range(half):
            angle = torch.tensor(t / w.rotary_base ** (2 * i / w.rotary_dim), dtype=x.dtype)
            a, b = x[..., t, i], x[..., t, i + half]
            out[..., t, i] = a * angle.cos() - b * angle.sin()
            out[..., t, i + half] = b * angle.cos() + a * angle.sin()
    return out


class Run:
    """A forward pass, head by head; `frozen` gives patterns and scales instead of computing them."""

    def __init__(self, w: CircuitWeights, tokens: Tensor, frozen: "Run | None" = None, *, zero=(), read=None):
        T, kv = tokens.shape[1], w.n_heads // w.W_K.shape[1]
        zeros = torch.zeros(w.n_heads, w.d_head, dtype=w.W_E.dtype)
        x = w.W_E[tokens]
        if w.positional == "standard":
            x = x + w.W_pos[:T]
        self.patterns, self.scales, self.outputs = [], [], []
        for layer in range(w.n_layers):
            stream = x if read is None else read[layer]
            normed, scale = norm(stream, w, frozen.scales[layer] if frozen else None)
            addressed = normed + w.W_pos[:T] if w.positional == "shortformer" else normed
            patterns, outputs = [], []
            for h in range(w.n_heads):
                if frozen:
                    pattern = frozen.patterns[layer][:, h]
                else:
                    q = addressed @ w.W_Q[layer, h] + (zeros if w.b_Q is None else w.b_Q[layer])[h]
                    k = addressed @ w.W_K[layer, h // kv] + (zeros if w.b_K is None else w.b_K[layer])[h // kv]
                    if w.positional == "rotary":
                        q, k = rotate(q, w), rotate(k, w)
                    scores = q @ k.transpose(1, 2) / (w.attention_scale or w.d_head**0.5)
                    scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
                    pattern = scores.softmax(-1)
                v = normed @ w.W_V[layer, h // kv] + (zeros if w.b_V is None else w.b_V[layer])[h // kv]
                out = pattern @ v @ w.W_O[layer, h]
                outputs.append(torch.zeros_like(out) if (layer, h) in zero else out)
                patterns.append(pattern)
            self.patterns.append(torch.stack(patterns, 1))
            self.scales.append(scale)
            self.outputs.append(torch.stack(outputs))
            x = x + sum(outputs) + (0 if w.b_O is None else w.b_O[layer])
        normed, scale = norm(x, w, frozen.scales[-1] if frozen else None)
        self.scales.append(scale)
        self.final = x
        self.logits = normed @ w.W_U + (0 if w.b_U is None else w.b_U)


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def order_losses_by_reruns(w: CircuitWeights, tokens: Tensor) -> list[Tensor]:
    """The article: run with every head's output saved and replaced by zero; then by what was saved; and so on."""
    clean = Run(w, tokens)
    embedded = w.W_E[tokens] + (w.W_pos[: tokens.shape[1]] if w.positional == "standard" else 0)

    def fixed(layers: int) -> Tensor:  # what is written there whatever is attended to
        x = embedded
        for layer in range(layers):
            x = x + (0 if w.b_O is None else w.b_O[layer])
            for h in range(w.n_heads):
                if w.b_V is not None:
                    x = x + w.b_V[layer, h // (w.n_heads // w.b_V.shape[1])] @ w.W_O[layer, h]
        return x

    saved = [torch.zeros_like(embedded) for _ in range(w.n_layers)]
    losses = []
    for _ in range(w.n_layers + 1):
        final, _ = norm(fixed(w.n_layers) + sum(saved, torch.zeros_like(embedded)), w, clean.scales[-1])
        losses.append(loss(final @ w.W_U + (0 if w.b_U is None else w.b_U), tokens))
        reads = [fixed(layer) + sum(saved[:layer], torch.zeros_like(embedded)) for layer in range(w.n_layers)]
        rerun = Run(w, tokens, clean, read=reads)
        saved = [
            rerun.outputs[layer].sum(0) - (fixed(layer + 1) - fixed(layer) - (0 if w.b_O is None else w.b_O[layer]))
            for layer in range(w.n_layers)
        ]
    return losses
