"""A Hugging Face model rerun with plain hooks on its own modules: what experiments must equal on every family."""

from contextlib import ExitStack, contextmanager

import torch

from support.modules import columns_of, counts_of, names_of


class Plain:
    """`run(z=..., inputs=..., frozen=...)` gives logits; `z[layer, head]` is what each head mixed in the last run."""

    def __init__(self, model, tokens, mask=None, **more):
        self.model, self.tokens = model, tokens
        self.more = more if mask is None else {"attention_mask": mask, **more}
        self.names, (self.heads, self.kv) = names_of(model), counts_of(model.config)
        self.layers = list(model.get_submodule(self.names["layers"]))
        self.attentions = [layer.get_submodule(self.names["attention"]) for layer in self.layers]
        self.fixed, self.z, self.streams = {}, {}, {}
        self.clean_logits = self.run()
        self.clean_z, self.clean_streams, self.kept = dict(self.z), dict(self.streams), dict(self.fixed)

    def out_weight(self, layer, head):
        """[r, d]"""
        weight = self.attentions[layer].get_submodule(self.names["out"]).weight
        weight = weight if self.names["out"] == "c_proj" else weight.T
        return weight.unflatten(0, (self.heads, -1))[head]

    def chain(self, layer, kind):
        """The modules that make queries, keys or values of what the attention reads."""
        return [self.attentions[layer].get_submodule(name) for name in self.names[kind]]

    def norm(self, layer, which="norm"):
        name = self.names.get(which)
        return None if name is None else self.layers[layer].get_submodule(name)

    def posted(self, written, layer):
        """What reaches the residual stream of a head's write: through a norm after the heads as it was, times a scale."""
        norm, scale = self.norm(layer, "post"), getattr(self.model.config, "residual_multiplier", 1.0)
        if norm is None:
            return written * scale
        return written * self.kept[layer, "post"] * (norm.weight + type(norm).__name__.startswith("Gemma"))

    @torch.no_grad()
    def run(self, z=None, inputs=None, frozen=False, final_frozen=None, mlp=None, layer=None):
        """Replace z of heads {(layer, head): value}, and inputs {(layer, head, "Q" | "K" | "V"): residual stream}, of
        keys and values by their own heads. `frozen`: queries, keys, MLPs and the scales of norms are those of the clean run.
        `mlp` {layer: f} replaces what its module gives by f(it), `layer` {layer: f} the stream that a layer reads.
        """
        z, inputs, mlp, stream = z or {}, inputs or {}, mlp or {}, layer or {}
        final_frozen = frozen if final_frozen is None else final_frozen
        made = {(layer, head, kind): self.made(layer, kind, x) for (layer, head, kind), x in inputs.items()}
        with ExitStack() as stack:
            hook = lambda module, f: stack.enter_context(hooked(module.register_forward_hook, f))  # noqa: E731
            for i, (layer, attention) in enumerate(zip(self.layers, self.attentions, strict=True)):
                keep = lambda m, a, kw, i=i: self.streams.__setitem__(i, (*a, *kw.values())[0])  # noqa: E731
                stack.enter_context(hooked(layer.register_forward_pre_hook, keep, with_kwargs=True))
                put = lambda m, a, i=i: self.put(i, a[0], z)  # noqa: E731
                stack.enter_context(hooked(attention.get_submodule(self.names["out"]).register_forward_pre_hook, put))
                for kind in "QKV":
                    hook(self.chain(i, kind)[-1], lambda m, a, out, i=i, kind=kind: self.reads(i, kind, out, made, frozen))  # fmt: skip
                if "within" in self.names:
                    self.hold_norm(hook, (i, "within"), attention.get_submodule(self.names["within"]), frozen)
                    hook(attention.kv_a_proj_with_mqa, lambda m, a, out, i=i: self.turning(i, out, frozen))
                for which in ("norm", "post"):
                    if self.norm(i, which) is not None:
                        self.hold_norm(hook, (i, which), self.norm(i, which), frozen)

                def given(m, a, out, i=i):
                    return (
                        mlp[i](self.hold((i, "mlp"), out, frozen)) if i in mlp else self.hold((i, "mlp"), out, frozen)
                    )

                hook(layer.get_submodule(self.names["mlp"]), given)
                if i in stream:
                    change = lambda m, a, kw, i=i: ((stream[i](a[0]), *a[1:]), kw)  # noqa: E731
                    stack.enter_context(hooked(layer.register_forward_pre_hook, change, with_kwargs=True))
            self.hold_norm(hook, "final", self.model.get_submodule(self.names["final"]), final_frozen)
            return self.model(self.tokens, use_cache=False, **self.more).logits

    def made(self, layer, kind, stream):
        """Queries, keys or values of all heads of a layer that reads this stream."""
        norm = self.norm(layer)
        x = stream if norm is None else norm(stream)
        for module in self.chain(layer, kind):
            x = module(x)
        return x

    def put(self, layer, mixed, z):
        heads = mixed.unflatten(-1, (self.heads, -1)).clone()
        for head in range(self.heads):
            self.z[layer, head] = heads[..., head, :].clone()
            if (layer, head) in z:
                heads[..., head, :] = z[layer, head]
        return (heads.flatten(-2),)

    def reads(self, layer, kind, out, made, frozen):
        columns = columns_of(self.model.config, kind, out.shape[-1])
        out = out.clone()
        if kind in "QK":
            out[..., columns] = self.hold((layer, kind), out[..., columns], frozen)
        for (at, head, which), instead in made.items():
            if (at, which) == (layer, kind):
                out[..., columns[head]] = instead[..., columns[head]]
        return out

    def turning(self, layer, out, frozen):
        """DeepSeek's keys that turn are made apart."""
        size, out = self.model.config.qk_rope_head_dim, out.clone()
        out[..., -size:] = self.hold((layer, "turning"), out[..., -size:], frozen)
        return out

    def hold(self, key, out, frozen):
        """What was made in the clean run if frozen."""
        self.fixed[key] = out.clone() if isinstance(out, torch.Tensor) else out
        held = self.kept[key] if frozen else out
        return held.clone() if isinstance(held, torch.Tensor) else held  # Falcon adds to it in place

    def hold_norm(self, hook, key, norm, frozen):
        """A norm with the scale of the clean run if frozen."""

        def of_norm(m, a, out):
            x, bias, eps = a[0], getattr(m, "bias", None), eps_of(m)
            linear = x - x.mean(-1, keepdim=True) if "LayerNorm" in type(m).__name__ else x
            scale = (linear.square().mean(-1, keepdim=True) + eps).rsqrt()
            bias = 0 if bias is None else bias
            return (out - bias) * (self.hold(key, scale, frozen) / scale) + bias

        hook(norm, of_norm)


def eps_of(norm):
    """OLMo's has it as a constant."""
    return next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)


@contextmanager
def hooked(register, function, **options):
    handle = register(function, **options)
    try:
        yield
    finally:
        handle.remove()
