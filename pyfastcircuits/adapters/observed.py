"""A family that has no table: where its modules stand is observed while the model runs, and probed.

Attention must go through transformers' interface, or torch's scaled_dot_product_attention. A module that is called
while another has not returned is inside it; that a tensor one module gave is what another reads is seen by identity.
What is found is held to the same checks as a family with a table, so that a model is either exact or refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyfastcircuits.adapters.agreement import digits
from pyfastcircuits.adapters.attention import attending, eager, plain
from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family, Interface
from pyfastcircuits.adapters.module_tensors import ModuleTensors
from pyfastcircuits.adapters.reading import read_checkpoint
from pyfastcircuits.adapters.recording import Call, Hooks
from pyfastcircuits.model.norms import normalized
from pyfastcircuits.model.queries import queries_or_keys
from pyfastcircuits.model.weights import CircuitWeights, QKNorm

SEQUENCES, LENGTHS = 8, (7, 11, 13)  # of the run that is observed: a length that no number of heads has
PLACE = re.compile(r"^(?P<body>.*)\.(?P<layers>\w+)\.(?P<layer>\d+)\.(?P<attention>.+)$")


@dataclass
class Seen:
    """One run: what each module read and gave, and the calls of attention with the module they came from."""

    reads: dict[str, Tensor] = field(default_factory=dict)
    gives: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # of modules, as they returned
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    attended: list[tuple[str, Tensor, Tensor, Tensor]] = field(default_factory=list)  # module, q, k, v


_KNOWN: "WeakKeyDictionary[nn.Module, tuple[Family, dict[str, Any]]]" = WeakKeyDictionary()


def observed(model: nn.Module) -> tuple[Family, dict[str, Any]]:
    """The description of a model's family, with what a configuration calls its sizes.

    Raises:
        ValueError: something that no such description has; the message says what, and where.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _observe(model)
    return _KNOWN[model]


def text_config(model: Any) -> Any:
    """The configuration of a model, or of the part of it that reads and predicts text."""
    whole = model.config
    return whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else whole


def _observe(model: Any) -> tuple[Family, dict[str, Any]]:
    where = f"{type(model).__name__}: model_type {text_config(model).model_type!r} has no table, and"
    names = {module: name for name, module in model.named_modules()}
    interface, seen = _run(model, names)
    if interface is None:
        raise ValueError(f"{where} its attention goes through neither transformers' interface nor torch's own function")
    places = [PLACE.match(name) for name, *_ in seen.attended]
    first = places[0]
    if first is None or any(place is None or place["attention"] != first["attention"] for place in places):
        raise ValueError(f"{where} its attentions are not at one place in each layer of a list")
    if [int(place["layer"]) for place in places if place] != list(range(len(places))):
        raise ValueError(f"{where} its layers do not attend once each, in order")
    body, layers = first["body"], first["layers"]
    layer, attention = f"{body}.{layers}.0", seen.attended[0][0]
    _, q, k, v = seen.attended[0]
    at = _Layer(where, model, seen, layer, attention)
    final = _final_norm(seen, body, layers, where)
    post = at.norm_after()
    kind, gain = at.kind_of_norm(f"{body}.{final}")
    family = Family(
        body=body, layers=layers, attention=first["attention"], interface=interface, norm=at.norm_before(),
        post_norm=post, norm_kind=kind, gain=gain, final_norm=final, head=names[model.get_output_embeddings()],
        embedding=names[model.get_input_embeddings()].removeprefix(f"{body}."), **at.projections(q, k, v),
    )  # fmt: skip
    family = replace(family, **_positions(model, seen, family), **_logit_scale(model, seen, f"{body}.{final}"))
    extra: dict[str, Any] = {"write_scale": at.write_scale(post), "embed_scale": _embed_scale(model, seen, family)}
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    extra["logit_cap"] = float(cap) if cap else None
    sizes = {
        "num_hidden_layers": len(places), "num_attention_heads": q.shape[1], "num_key_value_heads": k.shape[1],
        "head_dim": q.shape[3], "hidden_size": model.get_input_embeddings().weight.shape[1],
    }  # fmt: skip
    return _with_queries(model, seen, replace(family, options=lambda c, found: extra), sizes, extra)


def _with_queries(
    model: Any, seen: Seen, family: Family, sizes: dict[str, Any], extra: dict[str, Any]
) -> tuple[Family, dict[str, Any]]:
    """The family with the rotation and the norm that make the queries and keys seen; "of a run" if none does."""
    kinds: tuple[QKNorm, ...] = ("rmsnorm", "layernorm", "rmsnorm of all heads")
    rotations: tuple[Literal["halves", "adjacent"], ...] = ("halves", "adjacent")
    for pairs, kind in product(rotations, kinds):
        tried = replace(family, rotary_pairs=pairs, qk_norm_kind=kind)
        try:
            weights = read_checkpoint(tried, _checkpoint(model, tried, sizes))
        except ValueError:
            continue
        rotates = [_rotates(seen, family, weights, layer) for layer in range(weights.n_layers)]
        if None not in rotates:
            return replace(tried, rotates=partial(_entry, rotates)), sizes
    return replace(family, options=lambda c, found: extra | {"qk_norm": "of a run"}), sizes


def _entry(rotates: Sequence[bool | None], _: Checkpoint, layer: int) -> bool:
    return bool(rotates[layer])


def _rotates(seen: Seen, family: Family, weights: CircuitWeights, layer: int) -> bool | None:
    """Whether the queries and keys seen in a layer are those of the weights, rotated or not; None if neither."""
    stream = seen.reads[f"{family.body}.{family.layers}.{layer}"].to(weights.compute_dtype)
    read, places = normalized(stream, weights), torch.arange(stream.shape[1], device=stream.device)
    _, q, k, _ = seen.attended[layer]
    for rotated in (True, False):
        where = places if rotated else None
        made = (queries_or_keys(weights, name, layer, read, where) for name in ("Q", "K"))
        if all(ours.shape == theirs.shape and _close(ours, theirs) for ours, theirs in zip(made, (q, k), strict=True)):
            return rotated
    return None


def _checkpoint(model: Any, family: Family, sizes: dict[str, Any]) -> Checkpoint:
    config = text_config(model).to_dict() | sizes
    return Checkpoint(type(model).__name__, config, ModuleTensors(model), family.body, model)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they agree as the parts of a run must; see Agreement."""
    return bool((ours.double() - theirs.double()).abs().max() <= digits(theirs.dtype) * theirs.double().abs().max())


def _run(model: Any, names: dict[nn.Module, str]) -> tuple[Interface | None, Seen]:
    """One run, by the first interface that attention goes through."""
    table = model.get_input_embeddings().weight
    config = text_config(model)
    heads = {getattr(config, name, 0) for name in ("num_attention_heads", "num_key_value_heads", "n_head")}
    length = next(length for length in LENGTHS if length not in heads)
    tokens = torch.arange(SEQUENCES * length, device=table.device).view(SEQUENCES, length) % len(table)
    interfaces: tuple[tuple[Interface, Callable[..., Any]], ...] = (("transformers", eager), ("sdpa", plain))
    for interface, attend in interfaces:
        seen, inside = Seen(tokens=tokens), []  # type: ignore[var-annotated]

        def keep(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, attend: Any = attend, **given: Any) -> Any:
            seen.attended.append((inside[-1], q, k, v))  # noqa: B023
            return attend(module, q, k, v, mask, **given)

        try:
            through = attending(config, keep, interface, masked=interface == "transformers")
            with torch.no_grad(), Hooks(model), through, _watching(names, seen, inside):
                model(input_ids=tokens, use_cache=False)
        except (AttributeError, KeyError, TypeError):  # of a module without a function of its own for eager attention
            continue
        if seen.attended:
            return interface, seen
    return None, Seen()


@contextmanager
def _watching(names: dict[nn.Module, str], seen: Seen, inside: list[str]) -> Iterator[None]:
    handles = []
    for module, name in names.items():

        def enter(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            inside.append(name)
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if tensors:
                seen.reads.setdefault(name, tensors[0])

        def leave(_: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            inside.pop()
            seen.gives.setdefault(name, out[0] if isinstance(out, tuple) else out)
            seen.order.append(name)

        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _final_norm(seen: Seen, body: str, layers: str, where: str) -> str:
    """The last module of the body behind the layers; what it gives is what the head reads."""
    inside = [name for name in seen.order if name.startswith(f"{body}.") and not name.startswith(f"{body}.{layers}.")]
    last = [name for name in inside if seen.order.index(name) > seen.order.index(f"{body}.{layers}.0")]
    if not last:
        raise ValueError(f"{where} no norm stands behind its layers")
    return last[-1].removeprefix(f"{body}.")


def _embed_scale(model: Any, seen: Seen, family: Family) -> float:
    """What embeddings are multiplied by, if positions are not added to them."""
    if family.positions is not None:
        return 1.0
    embedded = model.get_submodule(f"{family.body}.{family.embedding}").weight[seen.tokens]
    return _ratio(seen.reads[f"{family.body}.{family.layers}.0"], embedded)


def _logit_scale(model: Any, seen: Seen, final: str) -> dict[str, Any]:
    """What the head's logits are multiplied by, unless they are capped."""
    if getattr(text_config(model), "final_logit_softcapping", None):
        return {}
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    logits = seen.gives[final].double() @ head.weight.double().mT
    scale = _ratio(seen.gives[""].logits, logits if bias is None else logits + bias)
    return {} if scale == 1 else {"logit_scale": lambda c: scale}


def _ratio(theirs: Tensor, ours: Tensor) -> float:
    """The factor between two tensors, 1 if it is that up to rounding."""
    wide = ours.detach().double()
    scale = float((theirs.double() * wide).sum() / wide.square().sum())
    return 1.0 if abs(scale - 1) <= torch.finfo(theirs.dtype).eps ** 0.5 else scale


def _positions(model: Any, seen: Seen, family: Family) -> dict[str, Any]:
    """Positions that are added to the stream are those of an embedding in the body; else queries and keys rotate."""
    body = model.get_submodule(family.body)
    for name, module in body.named_children():
        if isinstance(module, nn.Embedding) and name != family.embedding and f"{family.body}.{name}" in seen.gives:
            offset = len(module.weight) - int(text_config(model).max_position_embeddings)
            return {"positions": name, "first_position": max(0, offset), "rotary": lambda c: False}
    rotates = any(name.endswith("inv_freq") for name, _ in body.named_buffers())
    return {"rotary": lambda c: rotates}


class _Layer:
    """The first layer of an observed model."""

    def __init__(self, where: str, model: Any, seen: Seen, layer: str, attention: str) -> None:
        self.where, self.model, self.seen, self.layer, self.attention = where, model, seen, layer, attention

    def norm_before(self) -> str | None:
        """The module in the layer that gave what the attention reads; None if that is the stream itself."""
        read = self.seen.reads[self.attention]
        if read is self.seen.reads[self.layer]:
            return None
        return self._named(lambda name: self.seen.gives[name] is read, "gives what its attention reads")

    def norm_after(self) -> str | None:
        """The module in the layer that reads what the attention gave, and nothing else."""
        gave = self.seen.gives[self.attention]
        found = [n for n in self._parts() if self.seen.reads.get(n) is gave and self.seen.gives[n] is not gave]
        return found[0].removeprefix(f"{self.layer}.") if found else None

    def kind_of_norm(self, name: str) -> tuple[Any, float]:
        """Whether a norm is a layernorm or an RMS norm, and what it adds to the gain it holds."""
        norm, x = self.model.get_submodule(name), self.seen.reads[name].double()
        eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)))
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        made = self.seen.gives[name].double() - (0 if bias is None else bias)
        for kind in ("rmsnorm", "layernorm"):
            linear = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
            bare = linear * (linear.square().mean(-1, keepdim=True) + eps).rsqrt()
            for more in (0.0, 1.0):
                whole = bare * (1.0 if gain is None else gain + more)
                if _close(whole, made):
                    return kind, more
        raise ValueError(f"{self.where} {name} is neither a layernorm nor an RMS norm")

    def projections(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The Linears that make queries, keys and values, which of their rows, and the one that reads all heads."""
        made = {"Q": self._maker(q), "K": self._maker(k), "V": self._maker(v)}
        linears = {kind: linear for kind, (linear, _, _) in made.items()}
        rows = {kind: index for kind, (_, _, index) in made.items()}
        found: dict[str, Any] = {"queries": linears["Q"], "keys": linears["K"], "values": linears["V"]}
        if len(set(linears.values())) == 1:
            found["joint"] = linears["Q"]
        if "joint" in found or any(index != list(range(len(index))) for index in rows.values()):
            found["split"] = lambda x, kind, heads, kv: x[rows[kind]].unflatten(0, (heads if kind == "Q" else kv, -1))
        found |= {f"{name}_norm": made[kind][1] for name, kind in (("query", "Q"), ("key", "K")) if made[kind][1]}
        write = self.seen.gives[self.attention]
        out = [n for n in self._parts(self.attention) if self.seen.gives[n] is write and self._is_linear(n)]
        if not out:
            raise ValueError(f"{self.where} no Linear in {self.attention} gives what it writes")
        return {**found, "out": out[-1].removeprefix(f"{self.attention}.")}

    def _maker(self, made: Tensor) -> tuple[str, str | None, list[int]]:
        """The Linear whose output at the first position, where nothing has turned, holds queries, keys or values.

        With the norm that these go through, if there is one, and the rows of the Linear.
        """
        cut = len(self.attention) + 1
        wanted = made[:, :, 0].flatten(1)
        for name in self._parts(self.attention):
            if self._is_linear(name) and (rows := _columns(wanted, self.seen.gives[name][:, 0])) is not None:
                return name[cut:], None, rows
        for norm in self._parts(self.attention):
            gave, read = self.seen.gives[norm], self.seen.reads.get(norm)
            if self._is_linear(norm) or read is None or not isinstance(gave, Tensor):
                continue
            if (at := self._first(gave)).shape == wanted.shape and _close(at, wanted):
                for name in self._parts(self.attention):
                    if self._is_linear(name) and (rows := _columns(self._first(read), self.seen.gives[name][:, 0])):
                        return name[cut:], norm[cut:], rows
        raise ValueError(f"{self.where} no Linear in {self.attention} makes its queries, keys or values by itself")

    def _first(self, x: Tensor) -> Tensor:
        """What stands at the first position, [B, n], of [B, T, ...] or [B, H, T, r]."""
        return (x if x.shape[1] == self.seen.tokens.shape[1] else x.transpose(1, 2))[:, 0].flatten(1)

    def _is_linear(self, name: str) -> bool:
        module = self.model.get_submodule(name)
        return hasattr(module, "in_features") or hasattr(module, "base_layer")

    def write_scale(self, post: str | None) -> float:
        """What the attention's write is multiplied by on its way into the stream: by changing it, all else held."""
        name = self.attention if post is None else f"{self.layer}.{post}"
        added = torch.randn_like(self.seen.gives[name])
        layer, held = self.model.get_submodule(self.layer), dict[str, Tensor]()
        parts = {
            f"{self.layer}.{child}": module
            for child, module in layer.named_children()
            if f"{self.layer}.{child}" == name or self._is_held(f"{self.layer}.{child}")
        }
        calls: list[tuple[Tensor, Call]] = []

        def keep(part: str, _: Any, out: Any) -> None:
            held[part] = (out[0] if isinstance(out, tuple) else out).clone()

        def change(part: str, _: Any, out: Any) -> Any:
            gave = held[part] + (added if part == name else 0)
            return (gave, *out[1:]) if isinstance(out, tuple) else gave

        with torch.no_grad(), Hooks(self.model) as hooks:
            hooks.before(layer, lambda x, call: calls.append((x, call)))
            for part, module in parts.items():
                hooks.after(module, partial(keep, part))
            self.model(input_ids=self.seen.tokens, use_cache=False)
        (stream, call), outs = calls[0], []
        for which in ((), tuple(parts)):
            with torch.no_grad(), Hooks(layer) as hooks:
                for part in which:
                    hooks.after(parts[part], partial(change, part))
                out = call(layer, stream.clone())
                outs.append((out[0] if isinstance(out, tuple) else out).clone())
        moved = outs[1] - outs[0]
        scale = _ratio(moved, added)
        if not _close(scale * added, moved):
            raise ValueError(f"{self.where} what {name} writes is not added to the residual stream of {self.layer}")
        return scale

    def _is_held(self, part: str) -> bool:
        """Whether a part of the layer, but for its attention, gives another tensor than it reads."""
        gave = self.seen.gives.get(part)
        return part != self.attention and isinstance(gave, Tensor) and gave is not self.seen.reads.get(part)

    def _parts(self, inside: str | None = None) -> list[str]:
        whole = self.layer if inside is None else inside
        return [name for name in self.seen.order if name.startswith(f"{whole}.")]

    def _named(self, fits: Callable[[str], bool], what: str) -> str:
        found = [name for name in self._parts() if name in self.seen.gives and fits(name)]
        if not found:
            raise ValueError(f"{self.where} no module in {self.layer} {what}")
        return found[0].removeprefix(f"{self.layer}.")


def _columns(wanted: Tensor, held: Tensor) -> list[int] | None:
    """The columns of [B, m] that make [B, n]; None if they are not among them."""
    if held.dim() != 2 or len(held) != len(wanted) or held.shape[1] < wanted.shape[1]:
        return None
    weigh = torch.linspace(1, 2, len(held), dtype=torch.float64, device=held.device).sqrt()
    values, order = (weigh @ held.double()).sort()
    sought = weigh @ wanted.double()
    place = torch.searchsorted(values, sought).clamp(1, len(values) - 1)
    nearer = (values[place] - sought).abs() < (values[place - 1] - sought).abs()
    columns = order[torch.where(nearer, place, place - 1)]
    return columns.tolist() if _close(held[:, columns], wanted) else None
