"""The gradient of a metric by the final residual stream, a block of logits at a time."""

import torch
from torch import Tensor

from pyfastcircuits.experiments.metrics import KL, NLL, Asked, LogitDifference, weighed
from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.model.norms import final_norm_gain, norm_scale
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import CleanLogits, Unembedding, row_losses, slices
from pyfastcircuits.run.trace import FrozenTrace


def metric_gradient(part: FrozenTrace, final: Tensor, asked: Asked, how: Measurement) -> Tensor:
    """The gradient [B, T, d] of the metric's mean over the positions measured, where `final` [B, T, d] is the stream.

    KL is the divergence from the clean run's prediction.
    """
    with torch.enable_grad():
        stream = final.detach().requires_grad_()
        rows = asked.rows(_normed(part, stream, how))
        if isinstance(how.metrics[0], KL):
            by_rows = _divergence_gradient(part, rows.detach(), asked) / len(rows)
            (gradient,) = torch.autograd.grad(rows, stream, by_rows)
        else:
            (gradient,) = torch.autograd.grad(_metric_of_rows(part, rows, asked, how).mean(), stream)
    return gradient


def _normed(part: FrozenTrace, final: Tensor, how: Measurement) -> Tensor:
    """What W_U reads of a final stream [B, T, d], differentiable."""
    scale = part.scales[-1] if how.final_norm == "frozen" else norm_scale(final, part.weights)
    return final_norm_gain(final, part.weights) * scale[..., None]


def _metric_of_rows(part: FrozenTrace, rows: Tensor, asked: Asked, how: Measurement) -> Tensor:
    """The metric [N] of rows [N, d] of the normed final stream, differentiable: nll, logit difference, probability."""
    weights, metric = part.weights, how.metrics[0]
    if not isinstance(metric, LogitDifference):
        losses = row_losses(rows, asked.tokens()[:, 0], weights, how.backend)
        return losses if isinstance(metric, NLL) else (-losses).exp()
    clean, cap = CleanLogits(rows, Unembedding(weights), held=False), weights.logit_cap
    logits = [clean.of_tokens(tokens) for tokens in asked.tokens().unbind(-1)]
    capped = logits if cap is None else [cap * (x / cap).tanh() for x in logits]
    return weighed(asked.shares().unbind(-1), capped)


def _divergence_gradient(part: FrozenTrace, rows: Tensor, asked: Asked) -> Tensor:
    """The gradient of KL(clean || changed) by changed rows [N, d], [N, d]: (changed - clean probabilities) @ W_U.T."""
    weights, bias = part.weights, part.weights.whole_unembed_bias()
    W_U, cap = weights.W_U.to(rows.dtype), weights.logit_cap
    clean_rows, out = asked.rows(part.read_by_unembedding(part.final)), torch.empty_like(rows)
    at_once = max(1, 4 * memory.block_bytes(rows.device) // W_U[0].nbytes)
    for some in slices(len(rows), at_once):
        changed, clean = (_logits(x[some], W_U, bias, cap) for x in (rows, clean_rows))
        by_logits = changed.softmax(-1) - clean.softmax(-1)
        if cap is not None:
            by_logits *= 1 - (changed / cap).square()
        out[some] = by_logits @ W_U.mT
    return out


def _logits(rows: Tensor, W_U: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    logits = rows @ W_U
    logits = logits if bias is None else logits + bias
    return logits if cap is None else cap * (logits / cap).tanh()
