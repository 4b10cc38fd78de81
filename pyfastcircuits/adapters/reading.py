"""CircuitWeights read from a checkpoint of any family, in memory or on disk."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint, heads_out
from pyfastcircuits.adapters.family import Family, Kind
from pyfastcircuits.adapters.rotation import rotation
from pyfastcircuits.model.layers import Layers
from pyfastcircuits.model.weights import CircuitWeights

HEADS = ("lm_head", "embed_out")  # the output embedding of GPT-NeoX has another name on disk


def read_checkpoint(family: Family, c: Checkpoint) -> CircuitWeights:
    """The circuits of a checkpoint, without its MLPs: `attention_only` is False.

    Raises:
        ValueError: a tensor or option is missing, does not fit or is not supported; the message names it.
    """
    family.check(c)
    d = int(c.first_option("hidden_size", "n_embd", "n_embed"))
    H, _ = family.counts(c)
    found = _projections(family, c, d) if family.read_heads is None else family.read_heads(family, c)
    r = found["W_Q"].shape[3]
    found |= _ends(family, c, d)
    found["W_O"] = _out(family, c, d, H)
    bias = family.in_attention(f"{family.out}.bias")
    if _held(c, bias, "O" in family.biases(c)):
        found["b_O"] = c.stack(bias, d)
    found |= _norms(family, c, d) | qk_norms(family, c, r) | score_scales(family, c, r)
    found |= rotation(family, c, r) if family.rotary(c) else {}
    found |= family.options(c, found)
    return CircuitWeights(**found, attention_only=False)


def _held(c: Checkpoint, name: str, asked: bool) -> bool:
    """Whether a tensor, `{}` in the name being the layer, is to be read.

    Where a model is in memory it is if a layer has it, on disk if the configuration asks for it.
    """
    return asked if c.model is None else any(c.has(name.format(i)) for i in range(c.n_layers))


def _projections(family: Family, c: Checkpoint, d: int) -> dict[str, Any]:
    heads, kv = family.counts(c)
    projections: tuple[tuple[Kind, str], ...] = (("Q", family.queries), ("K", family.keys), ("V", family.values))
    out: dict[str, Any] = {}
    for kind, own in projections:
        name = family.joint or own
        weight, bias = family.in_attention(f"{name}.weight"), family.in_attention(f"{name}.bias")
        split = partial(_split, family, kind, heads, kv)
        out[f"W_{kind}"] = c.layers(
            weight, *_shape(family, c, weight, kind, d), view=partial(_transposed, family, split)
        )
        if _held(c, bias, kind in family.biases(c)):
            out[f"b_{kind}"] = c.stack(bias, view=split)
    return out


def _split(family: Family, kind: Kind, heads: int, kv: int, rows: Tensor) -> Tensor:
    return family.split(rows, kind, heads, kv)


def _transposed(family: Family, split: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """By heads, [n, d, r]."""
    return split(weight.mT if family.transposed else weight).mT


def _shape(family: Family, c: Checkpoint, weight: str, kind: str, d: int) -> tuple[int, ...]:
    """The shape that a projection has by the configuration."""
    heads, kv = family.counts(c)
    found = c.shape(weight.format(0))
    if family.joint is not None:
        rows = found[1 if family.transposed else 0]
        return (d, rows) if family.transposed else (rows, d)
    r = int(c.option("head_dim", 0)) or c.shape(family.in_attention(f"{family.queries}.weight").format(0))[0] // heads
    return ((heads if kind == "Q" else kv) * r, d)


def _out(family: Family, c: Checkpoint, d: int, H: int) -> Layers:
    name = family.in_attention(f"{family.out}.weight")
    if family.transposed:
        return c.layers(name, view=lambda weight: weight.unflatten(0, (H, -1)))
    rows = c.shape(name.format(0))[1]
    return c.layers(name, d, rows, view=heads_out(H))


def _ends(family: Family, c: Checkpoint, d: int) -> dict[str, Any]:
    """Embeddings, with their norm, and unembedding; positions."""
    table = f"{family.body}.{family.embedding}.weight"
    raw = c.tensor(table)
    out: dict[str, Any] = {"W_E": raw}
    if family.embedding_norm is not None:
        gain, bias = (c.tensor(f"{family.body}.{family.embedding_norm}.{part}") for part in ("weight", "bias"))
        out["W_E"] = torch.nn.functional.layer_norm(raw, (d,), gain, bias, _eps(family, c))
    if family.positions is not None:
        out["W_pos"] = c.tensor(f"{family.body}.{family.positions}.weight")[family.first_position :]
        out["positional"] = "standard"
    head = next((name for name in HEADS if c.has(f"{name}.weight")), None)
    tied = c.model is None and c.option("tie_word_embeddings", family.tied)
    out["W_U"] = raw.mT if tied else c.tensor(f"{head or family.head}.weight").mT
    scale = family.logit_scale(c)
    if _held(c, f"{head}.bias", "U" in family.biases(c)):
        out["b_U"] = c.tensor(f"{head or family.head}.bias") * scale
    return out


def _norms(family: Family, c: Checkpoint, d: int) -> dict[str, Any]:
    """Gains and biases of the norms of the residual stream; the scale of the logits joins those of the final one."""
    out: dict[str, Any] = {
        "norm": family.norm_kind,
        "eps": _eps(family, c),
        "norm_before_heads": family.norm is not None,
    }
    scale = family.logit_scale(c)
    for leaf, field, extra in (("weight", "w", family.gain), ("bias", "b", 0.0)):
        norm = norm_name(family, c)
        if norm is not None and _held(c, f"{norm.format(0)}.{leaf}", leaf in family.norm_parts):
            out[f"ln_{field}"] = _raised(c.stack(f"{norm}.{leaf}", d), extra)
        final = f"{family.body}.{family.final_norm}.{leaf}"
        if _held(c, final, leaf in family.norm_parts):
            out[f"ln_final_{field}"] = _times(_raised(c.tensor(final, d), extra), scale)
        elif leaf == "weight" and scale != 1:
            out["ln_final_w"] = c.tensor(f"{family.body}.{family.embedding}.weight").new_full((d,), scale)
    if family.post_norm is not None:
        out["ln_post_w"] = _raised(c.stack(family.layer(f"{family.post_norm}.weight"), d), family.gain)
    return out


def norm_name(family: Family, c: Checkpoint) -> str | None:
    """The name of the norm before a layer's heads, with `{}` for the layer; None if there is none."""
    names = (family.norm,) if isinstance(family.norm, str) else family.norm or ()
    held = [family.layer(name) for name in names]
    return next((name for name in held if c.has(f"{name.format(0)}.weight")), held[0] if held else None)


def _raised(gain: Tensor, by: float) -> Tensor:
    return gain + by if by else gain


def _times(gain: Tensor, scale: float) -> Tensor:
    return gain if scale == 1 else gain * scale


def qk_norms(family: Family, c: Checkpoint, r: int) -> dict[str, Any]:
    """The norms of queries and keys, where the model has them."""
    if family.latent_norms:
        return {"qk_norm": family.qk_norm_kind}
    if c.model is None and not family.qk_norms(c):
        return {}
    out: dict[str, Any] = {}
    for kind, part in (("q", family.query_norm), ("k", family.key_norm)):
        for leaf, field, extra in (("weight", "w", family.gain), ("bias", "b", 0.0)):
            asked = c.model is None and leaf == "weight"
            whole = [_norm_of_heads(c, family.in_attention(part).format(i), leaf, r, asked) for i in range(c.n_layers)]
            found = [x for x in whole if x is not None]
            if found:
                out[f"ln_{kind}_{field}"] = _raised(torch.stack(found), extra)
                out["qk_norm"] = family.qk_norm_kind
    if out:
        module = c.module(family.in_attention(family.query_norm).format(0))
        held = getattr(module, "norms", [module])[0]
        eps = own_eps(held)
        out["qk_eps"] = eps if eps is not None else _eps(family, c)
    return out


def _norm_of_heads(c: Checkpoint, name: str, leaf: str, r: int, asked: bool) -> Tensor | None:
    """[n, r]: of one norm for all heads, of all heads, or of a list of norms; None, unless asked, if there is none."""
    if c.has(f"{name}.{leaf}"):
        return c.tensor(f"{name}.{leaf}").reshape(-1, r)
    parts, i = [], 0
    while c.has(f"{name}.norms.{i}.{leaf}"):
        parts.append(c.tensor(f"{name}.norms.{i}.{leaf}", r))
        i += 1
    if asked and not parts:
        return c.tensor(f"{name}.{leaf}", r)  # names what is missing
    return torch.stack(parts) if parts else None


def own_eps(norm: Any) -> float | None:
    """The eps of a norm, as it is kept there; None if the module has none."""
    found = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)
    return None if found is None else float(found)


def _eps(family: Family, c: Checkpoint) -> float:
    """The eps of the norms of the residual stream.

    Raises:
        ValueError: two norms have different ones.
    """
    norm = norm_name(family, c)
    names = [f"{family.body}.{family.final_norm}"]
    names += [norm.format(i) for i in range(c.n_layers)] if norm is not None else []
    names += [family.layer(family.post_norm).format(i) for i in range(c.n_layers)] if family.post_norm else []
    held = {name: own_eps(c.module(name)) for name in names if c.module(name) is not None}
    by_modules = {eps: name for name, eps in held.items() if eps is not None}
    if len(by_modules) > 1:
        shown = ", ".join(f"{name} has eps {eps}" for eps, name in list(by_modules.items())[:2])
        raise ValueError(f"{c.where}: {shown}, and norms that differ in it are not supported")
    return next(iter(by_modules)) if by_modules else float(c.first_option(*family.eps, default=family.default_eps))


def score_scales(family: Family, c: Checkpoint, r: int) -> dict[str, Any]:
    """What the attention scores are divided by, as the attentions in memory have it."""
    attentions = [c.module(family.layer(family.attention).format(i)) for i in range(c.n_layers)]
    held = [getattr(attention, "scaling", None) for attention in attentions]
    scales = [scale for scale in held if isinstance(scale, float) and scale > 0]
    if len(scales) < len(held) or not scales:
        return {}
    divisors = [1 / scale for scale in scales]
    alike = all(divisor == divisors[0] for divisor in divisors)
    if alike:
        return {"attention_scale": None if scales[0] == r**-0.5 else divisors[0]}
    return {"attention_scale": tuple(divisors)}
