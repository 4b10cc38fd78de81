"""Gradients by what each receiver reads, and edited models, by plain hooks on one input of one head at a time."""

import torch

from support.hooked import Hooked


def hooked_scores(w, clean, corrupted, metric, at=None):
    """{(node, receiver): score} of a model of heads alone: autograd through a rerun, a rerun for each receiver.

    metric(logits) is a scalar. `at`: the embeddings at which gradients are taken, those of the clean run by default.
    """
    run, other = Hooked(w, clean), Hooked(w, corrupted)
    change = node_changes(w, run, other)
    scores = {}
    for layer in [*range(w.n_layers), None]:
        for head in range(w.n_heads if layer is not None else 1):
            for kind in "QKV" if layer is not None else ["logits"]:
                gradient = receiver_gradient(w, clean, (layer, head, kind), metric, at)
                receiver = "logits" if layer is None else ((layer, head), kind)
                for node, x in change.items():
                    if layer is None or node == "embed" or node[0] < layer:
                        scores[node, receiver] = float((x * gradient).sum())
    return scores


def node_changes(w, run, other):
    """What each node writes in the other run, less in this one."""
    change = {"embed": other.streams[0] - run.streams[0]}
    for layer in range(w.n_layers):
        for head in range(w.n_heads):
            change[layer, head] = (other.z[layer, head] - run.z[layer, head]) @ w.W_O[layer, head]
    return change


def receiver_gradient(w, tokens, receiver, metric, at=None):
    layer, head, kind = receiver
    added = torch.zeros(*tokens.shape, w.d_model, dtype=w.W_E.dtype, requires_grad=True)

    def hook(name, l, h, x):  # noqa: E741
        return x + added if (l, h, name) == (layer, head, kind) else x

    run = Rerun(w, tokens, hook, at)
    logits = run.logits if layer is not None else run.unembedded(run.final + added)
    return torch.autograd.grad(metric(logits), added)[0]


class Rerun(Hooked):
    """A Hooked whose embeddings may be others: `at` [B, T, d]."""

    def __init__(self, w, tokens, hook=None, at=None):
        self.w, shift = w, 0
        if at is not None:
            shift = at - Hooked(w, tokens).streams[0]
        first = {}

        def shifted(name, layer, head, x):
            first.setdefault("x", x)
            x = x + shift if name != "z" else x  # the shift of the embedding is in every stream behind it
            return x if hook is None else hook(name, layer, head, x)

        super().__init__(w, tokens, shifted)
        self.final = self.final + shift
        self.logits = self.unembedded(self.final)

    def unembedded(self, final):
        from support import naive

        normed, _ = naive.norm(final, self.w, None)
        return normed @ self.w.W_U + (0 if self.w.b_U is None else self.w.b_U)


def edited_logits(w, clean, corrupted, inside):
    """Logits when each receiver reads what nodes now write by the edges inside, and by all others the corrupted run's."""
    other = Hooked(w, corrupted)
    theirs = {"embed": other.streams[0]}
    for layer in range(w.n_layers):
        theirs |= {(layer, head): other.z[layer, head] @ w.W_O[layer, head] for head in range(w.n_heads)}
    now = {"embed": Hooked(w, clean).streams[0]}
    biases = [0 if w.b_O is None else w.b_O[layer] for layer in range(w.n_layers)]

    def read(receiver, layer):
        nodes = [node for node in theirs if node == "embed" or node[0] < layer]
        return sum((now if (node, receiver) in inside else theirs)[node] for node in nodes) + sum(biases[:layer])

    def hook(name, layer, head, x):
        if name != "z":
            return read(((layer, head), name), layer)
        now[layer, head] = x @ w.W_O[layer, head]
        return x

    run = Rerun(w, clean, hook)
    return run.unembedded(read("logits", w.n_layers))
