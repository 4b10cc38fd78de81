"""A plain rerun with hooks, head by head: what every experiment must equal. Shares nothing with the library."""

import torch

from support import naive


class Hooked:
    """One forward pass of a CircuitWeights model. `hook(name, layer, head, x)` may replace, for each head, the residual
    stream that its "Q", "K" or "V" is made of, and its "z". `frozen`: patterns and norm scales of another run.
    """

    def __init__(self, w, tokens, hook=None, frozen=None, final_scale=None):
        hook = hook or (lambda name, layer, head, x: x)
        T, group = tokens.shape[1], w.n_heads // w.W_K.shape[1]
        hidden = ~torch.ones(T, T).tril().bool()
        places = w.W_pos[:T] if w.positional == "shortformer" else 0
        x = w.W_E[tokens] + (w.W_pos[:T] if w.positional == "standard" else 0)
        self.z, self.patterns, self.scales, self.streams = {}, {}, {}, []
        for layer in range(w.n_layers):
            self.streams.append(x)
            written = 0
            for h in range(w.n_heads):
                read = {}
                for name in "QKV":
                    at = (layer, h, name)
                    read[name], self.scales[at] = naive.norm(
                        hook(name, layer, h, x), w, frozen.scales[at] if frozen else None
                    )
                if frozen:
                    pattern = frozen.patterns[layer, h]
                else:
                    q = (read["Q"] + places) @ w.W_Q[layer, h]
                    k = (read["K"] + places) @ w.W_K[layer, h // group]
                    q = q if w.b_Q is None else q + w.b_Q[layer, h]
                    k = k if w.b_K is None else k + w.b_K[layer, h // group]
                    if w.positional == "rotary":
                        q, k = naive.rotate(q, w), naive.rotate(k, w)
                    scores = q @ k.mT / (w.attention_scale or w.d_head**0.5)
                    pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                v = read["V"] @ w.W_V[layer, h // group]
                z = pattern @ (v if w.b_V is None else v + w.b_V[layer, h // group])
                self.patterns[layer, h], self.z[layer, h] = pattern, hook("z", layer, h, z)
                written = written + self.z[layer, h] @ w.W_O[layer, h]
            x = x + written + (0 if w.b_O is None else w.b_O[layer])
        self.final = x
        normed, self.scales["final"] = naive.norm(x, w, final_scale)
        self.logits = normed @ w.W_U + (0 if w.b_U is None else w.b_U)


def measures(clean, logits, tokens, against):
    """Every metric by position, [B, T-1], from whole logits."""
    logits, clean, following = logits[:, :-1], clean[:, :-1], tokens[:, 1:, None]
    p, q = clean.log_softmax(-1), logits.log_softmax(-1)
    target = logits.gather(-1, following)
    rank = (logits > target).sum(-1).double()
    return {
        "nll": -q.gather(-1, following)[..., 0],
        "kl": (p.exp() * (p - q)).sum(-1),
        "logit_difference": target[..., 0] - logits[..., against],
        "probability": q.gather(-1, following)[..., 0].exp(),
        "rank": rank,
        "top1": (rank == 0).double(),
    }
