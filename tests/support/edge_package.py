"""Edge attribution as the EAP-IG package defines it, in plain TransformerLens: split inputs, hooks and autograd.

Every output is kept at every position, and the differences of all nodes are stacked, [B, T, nodes, d].
"""

import torch


def split(model):
    """Let a HookedTransformer read the residual stream for each input of each head by itself."""
    model.cfg.use_attn_result = model.cfg.use_split_qkv_input = model.cfg.use_hook_mlp_in = True
    model.cfg.ungroup_grouped_query_attention = model.cfg.n_key_value_heads is not None
    return model


def node_outputs(model, tokens, **options):
    """What every node writes: [B, T, nodes, d]."""
    layers, cfg = range(model.cfg.n_layers), model.cfg
    kept = {}
    names = ["blocks.0.hook_resid_pre"]
    for layer in layers:
        names += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"]
        names += [f"blocks.{layer}.ln1_post.hook_scale"] * cfg.use_normalization_before_and_after

    def keep(x, hook):
        kept[hook.name] = x

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names], **options)
    out = [kept[names[0]][:, :, None]]
    for layer in layers:
        result = kept[f"blocks.{layer}.attn.hook_result"]
        if cfg.use_normalization_before_and_after:  # what reaches the stream of a head's write
            norm = model.blocks[layer].ln1_post
            result = result / kept[f"blocks.{layer}.ln1_post.hook_scale"][:, :, None] * norm.w
        out.append(result)
        if f"blocks.{layer}.hook_mlp_out" in kept:
            out.append(kept[f"blocks.{layer}.hook_mlp_out"][:, :, None])
    return torch.cat(out, 2), logits


def package_scores(model, clean, corrupted, metric, steps=None, activations=False, **options):
    """Scores [nodes, receivers]; metric(logits, clean logits) is a mean. `steps`: of EAP-IG, of inputs or activations.

    Of activations: the input, all heads of a layer and each MLP in turn give (1 - k / steps) of the corrupted output
    and k / steps of the clean one, k = 1 to steps; the scores of all these runs are averaged.
    """
    ours, clean_logits = node_outputs(model, clean, **options)
    theirs, _ = node_outputs(model, corrupted, **options)
    change, layers, heads = theirs - ours, model.cfg.n_layers, model.cfg.n_heads
    mlps = not model.cfg.attn_only
    parallel, width = model.cfg.parallel_attn_mlp, heads + mlps
    receivers = layers * (3 * heads + mlps) + 1
    scores = torch.zeros(change.shape[2], receivers, dtype=change.dtype)

    def watch(first, before):
        def backward(gradient, hook):
            gradient = gradient if gradient.dim() == 4 else gradient[:, :, None]
            found = torch.einsum("btud,btvd->uv", change[:, :, :before], gradient)
            scores[:before, first : first + gradient.shape[2]] += found

        return backward

    hooks = []
    for layer in range(layers):
        at, before = layer * (3 * heads + mlps), 1 + layer * width
        for i, kind in enumerate("qkv"):
            hooks.append((f"blocks.{layer}.hook_{kind}_input", watch(at + i * heads, before)))
        if mlps:
            hooks.append((f"blocks.{layer}.hook_mlp_in", watch(at + 3 * heads, before + (0 if parallel else heads))))
    hooks.append((f"blocks.{layers - 1}.hook_resid_post", watch(receivers - 1, change.shape[2])))

    def start(x, hook):
        return x.detach().requires_grad_()

    def mixed(name, some, away):
        def give(x, hook):
            value = (1 - away) * ours[:, :, some] + away * theirs[:, :, some]
            return value.reshape(x.shape).detach().requires_grad_(name == "blocks.0.hook_resid_pre")

        return name, give

    if activations:
        groups = [("blocks.0.hook_resid_pre", slice(0, 1))]
        for layer in range(layers):
            at = 1 + layer * width
            groups.append((f"blocks.{layer}.attn.hook_result", slice(at, at + heads)))
            groups += [(f"blocks.{layer}.hook_mlp_out", slice(at + heads, at + width))] * mlps
        runs = [mixed(*group, 1 - k / steps) for group in groups for k in range(1, steps + 1)]
    else:
        aways = [0] if steps is None else [1 - k / steps for k in range(steps)]
        runs = [mixed("blocks.0.hook_resid_pre", slice(0, 1), away) for away in aways]
    for run in runs:
        first = ("blocks.0.hook_resid_pre", start)
        with model.hooks(fwd_hooks=[run] if run[0] == first[0] else [first, run], bwd_hooks=hooks):
            metric(model(clean, **options), clean_logits).backward()
    return scores / len(runs)


@torch.no_grad()
def edited_lens_logits(model, clean, corrupted, inside):
    """Logits when each receiver reads what nodes now write by the edges inside [nodes, receivers], else the other run's."""
    theirs, _ = node_outputs(model, corrupted)
    cfg, layers, heads = model.cfg, range(model.cfg.n_layers), model.cfg.n_heads
    now = [torch.zeros_like(theirs[:, :, :1])]
    mlps, scale = not cfg.attn_only, {}

    def read(receivers, x):
        """What receivers read: x is the sum of what all nodes now write, and biases."""
        change = theirs[:, :, : sum(y.shape[2] for y in now)] - torch.cat(now, 2)
        added = torch.einsum("btud,uv->btvd", change, 1 - inside[: change.shape[2], receivers])
        return x + (added if x.dim() == 4 else added[:, :, 0])

    def embedding(x, hook):
        now[0] = x[:, :, None]

    def scaled(x, hook):
        scale[hook.name] = x

    def heads_write(layer):
        def keep(x, hook):
            now.append(x)

        return keep

    def posted(layer):
        def keep(x, hook):
            now[-1] = now[-1] / x[:, :, None] * model.blocks[layer].ln1_post.w

        return keep

    def mlp_writes(x, hook):
        now.append(x[:, :, None])

    hooks = [("blocks.0.hook_resid_pre", embedding)]
    for layer in layers:
        at = layer * (3 * heads + mlps)
        for i, kind in enumerate("qkv"):
            some = slice(at + i * heads, at + (i + 1) * heads)
            hooks.append((f"blocks.{layer}.hook_{kind}_input", lambda x, hook, some=some: read(some, x)))
        hooks.append((f"blocks.{layer}.attn.hook_result", heads_write(layer)))
        if cfg.use_normalization_before_and_after:
            hooks.append((f"blocks.{layer}.ln1_post.hook_scale", posted(layer)))
        if mlps:
            some, parallel = slice(at + 3 * heads, at + 3 * heads + 1), cfg.parallel_attn_mlp

            def mlp_reads(x, hook, some=some, parallel=parallel):
                if not parallel:
                    return read(some, x)
                heads_out = now.pop()  # which a parallel MLP does not read
                out = read(some, x)
                now.append(heads_out)
                return out

            hooks.append((f"blocks.{layer}.hook_mlp_in", mlp_reads))
            hooks.append((f"blocks.{layer}.hook_mlp_out", mlp_writes))
    last = slice(inside.shape[1] - 1, inside.shape[1])
    hooks.append((f"blocks.{cfg.n_layers - 1}.hook_resid_post", lambda x, hook: read(last, x)))
    return model.run_with_hooks(clean, fwd_hooks=hooks)
