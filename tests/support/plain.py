"""A Hugging Face model rerun with plain hooks on its own modules: what experiments must equal on every family."""

from contextlib import ExitStack, contextmanager

import torch

GPT2 = {"layers": "transformer.h", "attention": "attn", "out": "c_proj", "norm": "ln_1", "final": "transformer.ln_f"}
NEOX = {"layers": "gpt_neox.layers", "attention": "attention", "out": "dense", "norm": "input_layernorm", "final": "gpt_neox.final_layer_norm"}  # fmt: skip
LLAMA = {"layers": "model.layers", "attention": "self_attn", "out": "o_proj", "norm": "input_layernorm", "final": "model.norm"}  # fmt: skip


class Plain:
    """`run(z=..., inputs=..., frozen=...)` gives logits; `z[layer, head]` is what each head mixed in the last run."""

    def __init__(self, model, tokens, mask=None):
        kind, config = model.config.model_type, model.config
        self.model, self.tokens, self.mask = model, tokens, mask
        self.names = {"gpt2": GPT2, "gpt_neox": NEOX}.get(kind, LLAMA)
        self.layers = list(model.get_submodule(self.names["layers"]))
        self.attentions = [layer.get_submodule(self.names["attention"]) for layer in self.layers]
        self.heads = config.num_attention_heads
        self.joint = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(kind)
        self.kv = getattr(config, "num_key_value_heads", None) or self.heads
        self.fixed, self.z, self.streams = {}, {}, {}
        self.clean_logits = self.run()
        self.clean_z, self.clean_streams, self.kept = dict(self.z), dict(self.streams), dict(self.fixed)

    def out_weight(self, layer, head):
        """[r, d]"""
        weight = self.attentions[layer].get_submodule(self.names["out"]).weight
        weight = weight if self.joint == "c_attn" else weight.T
        return weight.unflatten(0, (self.heads, -1))[head]

    def parts(self, layer):
        """{"Q": module, ...} and each module's output as heads: a view [B, T, heads, r] of Q, K or V."""
        own = self.attentions[layer]
        if self.joint == "c_attn":
            return {n: (own.c_attn, lambda x, i=i: x.unflatten(-1, (3, self.heads, -1))[..., i, :, :]) for i, n in enumerate("QKV")}  # fmt: skip
        if self.joint:
            return {n: (own.query_key_value, lambda x, i=i: x.unflatten(-1, (self.heads, 3, -1))[..., i, :]) for i, n in enumerate("QKV")}  # fmt: skip
        counts = {"Q": self.heads, "K": self.kv, "V": self.kv}
        return {n: (own.get_submodule(f"{n.lower()}_proj"), lambda x, n=n: x.unflatten(-1, (counts[n], -1))) for n in "QKV"}  # fmt: skip

    @torch.no_grad()
    def run(self, z=None, inputs=None, frozen=False, final_frozen=None):
        """Replace z of heads {(layer, head): value}, and inputs {(layer, head, "Q" | "K" | "V"): residual stream};
        `frozen`: queries, keys, MLPs and the scales of norms are those of the clean run.
        """
        z, inputs = z or {}, inputs or {}
        final_frozen = frozen if final_frozen is None else final_frozen
        masked = {} if self.mask is None else {"attention_mask": self.mask}
        with ExitStack() as stack:
            hook = lambda module, f: stack.enter_context(hooked(module.register_forward_hook, f))  # noqa: E731
            before = lambda module, f: stack.enter_context(hooked(module.register_forward_pre_hook, f))  # noqa: E731
            for i, (layer, attention) in enumerate(zip(self.layers, self.attentions, strict=True)):
                norm = layer.get_submodule(self.names["norm"])
                before(norm, lambda m, a, i=i: self.streams.__setitem__(i, a[0]))
                before(attention.get_submodule(self.names["out"]), lambda m, a, i=i: self.put(i, a[0], z))
                for name, (module, heads) in self.parts(i).items():
                    hook(module, lambda m, a, out, i=i, name=name, heads=heads, norm=norm: self.reads(m, i, name, heads, out, norm, inputs))  # fmt: skip
                    if frozen and name in "QK":
                        hook(module, lambda m, a, out, i=i, name=name, heads=heads: self.as_clean(i, name, heads, out))
                    elif not frozen and not z and not inputs:
                        hook(module, lambda m, a, out, i=i, name=name, heads=heads: self.fixed.__setitem__((i, name), heads(out).clone()))  # fmt: skip
                for which, module in (("mlp", layer.mlp), ("norm", norm), ("post", self.post(layer))):
                    if module is not None:
                        self.hold(hook, (i, which), module, frozen)
            self.hold(hook, "final", self.model.get_submodule(self.names["final"]), final_frozen)
            return self.model(self.tokens, **masked).logits

    def post(self, layer):
        return layer.post_attention_layernorm if self.model.config.model_type == "gemma2" else None

    def put(self, layer, mixed, z):
        heads = mixed.unflatten(-1, (self.heads, -1)).clone()
        for head in range(self.heads):
            self.z[layer, head] = heads[..., head, :].clone()
            if (layer, head) in z:
                heads[..., head, :] = z[layer, head]
        return (heads.flatten(-2),)

    def reads(self, module, layer, name, heads, out, norm, inputs):
        for (at, head, which), stream in inputs.items():
            if (at, which) == (layer, name):
                assert self.kv == self.heads or name == "Q"  # a key/value head has several readers
                hook, module._forward_hooks = module._forward_hooks, {}
                own, norm._forward_hooks = norm._forward_hooks, {}
                before, norm._forward_pre_hooks = norm._forward_pre_hooks, {}
                heads(out)[..., head, :] = heads(module(norm(stream)))[..., head, :]
                module._forward_hooks, norm._forward_hooks, norm._forward_pre_hooks = hook, own, before
        return out

    def as_clean(self, layer, name, heads, out):
        heads(out)[:] = self.kept[layer, name]
        return out

    def hold(self, hook, key, module, frozen):
        """Keep an MLP's output, or a norm's scale; in a frozen run use those of the clean one."""
        mlp = isinstance(key, tuple) and key[1] == "mlp"

        def of_mlp(m, a, out):
            if frozen:
                return self.kept[key]
            self.fixed[key] = out
            return None

        def of_norm(m, a, out):
            x = a[0]
            linear = x - x.mean(-1, keepdim=True) if getattr(m, "bias", None) is not None else x
            eps = getattr(m, "eps", None) or getattr(m, "variance_epsilon", None)
            scale = (linear.square().mean(-1, keepdim=True) + eps).rsqrt()
            if frozen:
                gain = m.weight + 1 if type(m).__name__.startswith("Gemma") else m.weight
                bias = getattr(m, "bias", None)
                return linear * self.kept[key] * gain + (0 if bias is None else bias)
            self.fixed[key] = scale
            return None

        hook(module, of_mlp if mlp else of_norm)


@contextmanager
def hooked(register, function):
    handle = register(function)
    try:
        yield
    finally:
        handle.remove()
