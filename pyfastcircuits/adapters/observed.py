"""A family that has no table: where its modules stand is observed while the model runs, and probed.

Attention must go through transformers' interface, or torch's scaled_dot_product_attention. A module that is called
while another has not returned is inside it; that a tensor one module gave is what another reads is seen by identity.
What is found is held to the same checks as a family with a table, so that a model is either exact or refused.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyfastcircuits.adapters.attention import attending, eager, plain
from pyfastcircuits.adapters.family import Family, Interface
from pyfastcircuits.adapters.recording import Hooks

PLACE = re.compile(r"^(?P<body>.*)\.(?P<layers>\w+)\.(?P<layer>\d+)\.(?P<attention>.+)$")
HALF = 0.5  # of the digits must agree


@dataclass
class Seen:
    """One run: what each module read and gave, and the calls of attention with the module they came from."""

    reads: dict[str, Tensor] = field(default_factory=dict)
    gives: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # of modules, as they returned
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


def _observe(model: Any) -> tuple[Family, dict[str, Any]]:
    where = f"{type(model).__name__}: model_type {model.config.model_type!r} has no table, and"
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
    ends = {
        "embedding": names[model.get_input_embeddings()].removeprefix(f"{body}."),
        "head": names[model.get_output_embeddings()],
        "final_norm": _final_norm(seen, body, layers, model, where),
    }
    norm, post = at.norm_before(), at.norm_after()
    kind, gain = at.kind_of_norm(f"{body}.{ends['final_norm']}")
    family = Family(
        body=body, layers=layers, attention=first["attention"], norm=norm, post_norm=post, norm_kind=kind, gain=gain,
        interface=interface, **ends, **at.projections(q, k, v),
    )  # fmt: skip
    family = replace(family, **_positions(model, seen, family, where))
    scale = at.write_scale(post)
    extra = {"write_scale": scale} if scale != 1 else {}
    embed = _embed_scale(model, seen, family)
    extra |= {"embed_scale": embed} if embed != 1 else {}
    cap = getattr(model.config, "final_logit_softcapping", None)
    extra |= {"logit_cap": float(cap)} if cap else {}
    sizes = {
        "num_hidden_layers": len(places), "num_attention_heads": q.shape[1], "num_key_value_heads": k.shape[1],
        "head_dim": q.shape[3], "hidden_size": model.get_input_embeddings().weight.shape[1],
    }  # fmt: skip
    return replace(family, options=lambda c, found: extra), sizes


def _run(model: Any, names: dict[nn.Module, str]) -> tuple[Interface | None, Seen]:
    """One run on three sequences of two tokens, by the first interface that attention goes through."""
    tokens = torch.arange(6, device=model.get_input_embeddings().weight.device).view(3, 2)
    tokens %= model.get_input_embeddings().weight.shape[0]
    config = getattr(model, "base_model", model).config
    interfaces: tuple[tuple[Interface, Callable[..., Any]], ...] = (("transformers", eager), ("sdpa", plain))
    for interface, attend in interfaces:
        seen, inside = Seen(), []  # type: ignore[var-annotated]

        def keep(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, attend: Any = attend, **given: Any) -> Any:
            seen.attended.append((inside[-1], q, k, v))  # noqa: B023
            return attend(module, q, k, v, mask, **given)

        try:
            through = attending(config, keep, interface, masked=interface == "transformers")
            with torch.no_grad(), Hooks(model), through, _watching(names, seen, inside):
                model(input_ids=tokens, use_cache=False)
        except (AttributeError, TypeError):  # of a module without a function of its own for eager attention
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


def _final_norm(seen: Seen, body: str, layers: str, model: Any, where: str) -> str:
    """The last module of the body behind the layers; what it gives is what the head reads."""
    inside = [name for name in seen.order if name.startswith(f"{body}.") and not name.startswith(f"{body}.{layers}.")]
    last = [name for name in inside if seen.order.index(name) > seen.order.index(f"{body}.{layers}.0")]
    if not last:
        raise ValueError(f"{where} no norm stands behind its layers")
    return last[-1].removeprefix(f"{body}.")


def _embed_scale(model: Any, seen: Seen, family: Family) -> float:
    """What embeddings are multiplied by, if positions are not added to them."""
    name = f"{family.body}.{family.embedding}"
    table, stream = model.get_submodule(name).weight, seen.reads[f"{family.body}.{family.layers}.0"]
    if family.positions is not None:
        return 1.0
    tokens = torch.arange(6, device=table.device).view(3, 2) % len(table)
    embedded = table[tokens].double()
    return _clean(float((stream.double() * embedded).sum() / embedded.square().sum()), table.dtype)


def _positions(model: Any, seen: Seen, family: Family, where: str) -> dict[str, Any]:
    """Positions that are added to the stream are those of an embedding in the body; else queries and keys rotate."""
    body = model.get_submodule(family.body)
    for name, module in body.named_children():
        if isinstance(module, nn.Embedding) and name != family.embedding and f"{family.body}.{name}" in seen.gives:
            offset = len(module.weight) - int(model.config.max_position_embeddings)
            return {"positions": name, "first_position": max(0, offset), "rotary": lambda c: False}
    rotates = any(name.endswith("inv_freq") for name, _ in body.named_buffers())
    return {"rotary": lambda c: rotates}


def _clean(scale: float, dtype: torch.dtype) -> float:
    """1 where it is that up to rounding."""
    return 1.0 if abs(scale - 1) <= torch.finfo(dtype).eps ** HALF else scale


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
        found = [name for name in self._parts() if self.seen.reads.get(name) is gave]
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
                if (made - whole).abs().max() <= torch.finfo(torch.float32).eps ** HALF * whole.abs().max():
                    return kind, more
        raise ValueError(f"{self.where} {name} is neither a layernorm nor an RMS norm")

    def projections(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The Linears that make queries, keys and values, and the one that reads what the heads have mixed."""
        found: dict[str, Any] = {}
        position = 0  # where nothing has turned
        for kind, made in (("queries", q), ("keys", k), ("values", v)):
            wanted = made[:, :, position].flatten(1)
            linear, norm = self._maker(wanted, made.shape[1])
            found[kind] = linear
            if norm is not None:
                found["query_norm" if kind == "queries" else "key_norm"] = norm
        out = [name for name in self._parts(self.attention) if self.seen.gives[name] is self.seen.gives[self.attention]]
        if not out:
            raise ValueError(f"{self.where} no module in {self.attention} gives what it writes")
        return {**found, "out": out[-1].removeprefix(f"{self.attention}.")}

    def _maker(self, wanted: Tensor, heads: int) -> tuple[str, str | None]:
        """The Linear whose rows at the first position are `wanted`, or those that a norm makes `wanted` of."""

        def first(name: str) -> Tensor:
            gave = self.seen.gives[name]
            by_position = gave if gave.shape[1] == 2 else gave.transpose(1, 2)
            return by_position[:, 0].flatten(1)

        digits = torch.finfo(wanted.dtype).eps ** HALF * float(wanted.abs().max())
        parts = [name for name in self._parts(self.attention) if isinstance(self.seen.gives[name], Tensor)]
        parts = [name for name in parts if self.seen.gives[name].dim() > 2 and first(name).shape == wanted.shape]
        same = [name for name in parts if (first(name) - wanted).abs().max() <= digits]
        cut = len(self.attention) + 1
        for name in same:
            module = self.model.get_submodule(name)
            if hasattr(module, "in_features") or hasattr(module, "base_layer"):
                return name[cut:], None
            before = self.seen.reads[name]
            for other in parts:
                gave = self.seen.gives[other]
                if gave.numel() == before.numel() and hasattr(self.model.get_submodule(other), "in_features"):
                    flat = before if before.shape[1] == 2 else before.transpose(1, 2)
                    if torch.equal(flat.flatten(2), gave):
                        return other[cut:], name[cut:]
        raise ValueError(
            f"{self.where} no Linear in {self.attention} makes its queries, keys or values [{heads} heads] by itself"
        )

    def write_scale(self, post: str | None) -> float:
        """What the attention's write is multiplied by on its way into the stream: by changing it, all else held."""
        name = self.attention if post is None else f"{self.layer}.{post}"
        added = torch.randn_like(self.seen.gives[name])
        layer = self.model.get_submodule(self.layer)

        def hold(_: Any, args: Any, out: Any, part: str = "") -> Any:
            gave = self.seen.gives[part] + (added if part == name else 0)
            return (gave, *out[1:]) if isinstance(out, tuple) else gave

        calls: list[tuple[Any, Any]] = []
        handles = [layer.register_forward_pre_hook(lambda _, args, more: calls.append((args, more)), with_kwargs=True)]
        try:
            with torch.no_grad(), Hooks(self.model):
                interface_tokens = torch.arange(6, device=added.device).view(3, 2)
                interface_tokens %= self.model.get_input_embeddings().weight.shape[0]
                self.model(input_ids=interface_tokens, use_cache=False)
                for child, module in layer.named_children():
                    part = f"{self.layer}.{child}"
                    if part == name or (isinstance(self.seen.gives.get(part), Tensor) and part not in (self.attention,)):
                        handles.append(module.register_forward_hook(lambda m, a, o, part=part: hold(m, a, o, part)))
                args, more = calls[0]
                out = layer(*args, **more)
        finally:
            for handle in handles:
                handle.remove()
        after = out[0] if isinstance(out, tuple) else out
        change = (after - self.seen.gives[self.layer]).double()
        scale = float((change * added).sum() / added.double().square().sum())
        if (change - scale * added).abs().max() > 1e-2 * change.abs().max():
            raise ValueError(f"{self.where} what {name} writes is not added to the residual stream of {self.layer}")
        return _clean(scale, added.dtype)

    def _parts(self, inside: str | None = None) -> list[str]:
        whole = self.layer if inside is None else inside
        return [name for name in self.seen.order if name.startswith(f"{whole}.")]

    def _named(self, fits: Callable[[str], bool], what: str) -> str:
        found = [name for name in self._parts() if name in self.seen.gives and fits(name)]
        if not found:
            raise ValueError(f"{self.where} no module in {self.layer} {what}")
        return found[0].removeprefix(f"{self.layer}.")
