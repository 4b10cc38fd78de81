"""What a rerun must do, whoever's modules do it: checks of a trace in fp64."""

import torch

import pyfastcircuits as fc
from pyfastcircuits.model.norms import final_norm_gain, norm_scale, normalized
from pyfastcircuits.run.forward import layer_after
from pyfastcircuits.run.nodes import MLP, has_mlp, nodes_before, written
from pyfastcircuits.run.patterns import QKPattern


def assert_exact(ours, theirs):
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= 1e-9, f"relative error {error:.3g}"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def real(run, x, heads=False):
    """Of [N, B, T, d], or [N, B, H, T, r], what stands at real positions."""
    x = x.transpose(2, 3).flatten(3) if heads else x
    return x if run.mask is None else x[:, run.mask]


def logits(run, stream):
    """Of a final residual stream, whose final norm is its own."""
    w = run.weights
    x = final_norm_gain(stream, w) * norm_scale(stream, w)[..., None] @ w.W_U
    x = x if w.whole_unembed_bias() is None else x + w.whole_unembed_bias()
    return x if w.logit_cap is None else w.logit_cap * (x / w.logit_cap).tanh()


def to_the_end(run, stream, layer=0, change=None):
    for later in range(layer, run.weights.n_layers):
        stream = run.forward.block(later, stream, change if later == layer else None)
    return stream


def check_clean(run):
    """With nothing changed it is the clean run; frozen projections are affine."""
    stream, w = run.embedded[None], run.weights
    one, other = noise(2, *stream.shape)
    for layer in range(w.n_layers):
        normed, pattern = run.normed(stream, layer), run.pattern(layer)
        q, k, v = run.forward.qkv(layer, normed)
        values, bias = run.read_by_values(stream, layer).unsqueeze(-3) @ w.layer("W_V", layer), w.bias("V", layer)
        assert_exact(real(run, v, True), real(run, values if bias is None else values + bias[:, None], True))
        assert q.shape == (*v.shape[:2], w.n_heads, v.shape[3], w.d_head)
        assert k.shape == (*v.shape[:4], w.d_head)
        z = pattern @ v[0].repeat_interleave(w.n_heads // v.shape[2], 1)
        assert_exact(real(run, run.forward.apply(layer, q, k, v), True), real(run, z[None], True))
        places = torch.eye(v.shape[3], dtype=v.dtype).expand(*v.shape[:4], -1)
        assert_exact(real(run, run.forward.apply(layer, q, k, places), True), real(run, pattern[None], True))

        zero, a, b, both = (run.forward.qkv(layer, x, frozen=True) for x in (0 * one, one, other, one + other))
        for kind, clean in enumerate(run.forward.qkv(layer, normed, frozen=True)):
            assert_exact(real(run, clean, True), real(run, (q, k, v)[kind], True))
            assert_exact(real(run, a[kind] + b[kind], True), real(run, both[kind] + zero[kind], True))
        stream = run.forward.block(layer, stream)
    assert_exact(real(run, stream), real(run, run.final[None]))


def check_halves(run):
    """A layer is its heads' write and its MLP, composed, wherever the MLP reads; the MLP's part is the rest of it."""
    layer = run.weights.n_layers - 1
    if run.forward.places_alike:
        some = run.streams[layer][None, :, 3:6]
        made = run.forward.qkv(layer, normalized(some, run.weights))
        for few, all_of_them in zip(
            made, run.forward.qkv(layer, run.normed(run.streams[layer], layer)[None]), strict=True
        ):
            assert_exact(few, all_of_them[..., 3:6, :])
    total = sum(written(run, node) for node in nodes_before(run, layer + 1))
    assert_exact(real(run, total[None]), real(run, run.final[None]))
    stream = run.streams[layer] + noise(2, *run.embedded.shape)
    z = run.forward.apply(layer, *run.forward.qkv(layer, normalized(stream, run.weights)))
    heads, whole = run.forward.write(layer, z), run.forward.block(layer, stream)
    assert_exact(real(run, layer_after(run.forward, layer, stream, heads)), real(run, whole))
    reads = run.forward.mlp_reads(layer)
    read = stream if reads == "before heads" else stream + heads
    mlp = run.forward.mlp(layer, read)
    assert_exact(real(run, layer_after(run.forward, layer, stream, heads, mlp)), real(run, whole))
    assert (reads is None) == (float(mlp.abs().max()) == 0)
    clean = run.forward.write(layer, run.z(layer)[None].transpose(1, 2))
    where = run.streams[layer][None] + (clean if reads == "after heads" else 0)
    if has_mlp(run, layer):
        assert_exact(real(run, written(run, MLP(layer))[None]), real(run, run.forward.mlp(layer, where)))
    if reads is not None:  # at each position alone; and the other stream is not what it reads
        assert_exact(run.forward.mlp(layer, read[:, :, 3:5]), mlp[:, :, 3:5])
        wrong = run.forward.mlp(layer, stream + heads if reads == "before heads" else stream)
        assert float((wrong - mlp).abs().max()) > 1e-3 * float(mlp.abs().max())


def check_scale(run):
    """Scores are scale * q k.T where nothing else shapes them: what is left of log patterns is their logsumexp."""
    for layer in range(run.weights.n_layers):
        q, k, _ = run.forward.qkv(layer, run.normed(noise(1, *run.embedded.shape), layer))
        places = torch.eye(q.shape[3], dtype=q.dtype).expand(*k.shape[:4], -1)
        pattern = run.forward.apply(layer, q, k, places)
        scores = run.forward.score_scale(layer) * q @ k.repeat_interleave(run.weights.n_heads // k.shape[2], 2).mT
        seen = pattern > 0
        assert_exact(pattern, scores.masked_fill(~seen, -torch.inf).softmax(-1))


def check_changes(run, theirs):
    """Changes are those of a hook on the model's attention, and of N at once each by itself.

    theirs(layer, change): the model's own logits where `change` [B, T, d] is added to what a layer's attention gives.
    """
    layer, count = run.weights.n_layers // 2, 3
    before = run.embedded[None]
    for earlier in range(layer):
        before = run.forward.block(earlier, before)
    change = noise(count, *run.embedded.shape)
    ends = to_the_end(run, before.expand(count, -1, -1, -1), layer, change)
    for i in range(count):
        assert_exact(real(run, logits(run, ends[i : i + 1])), real(run, theirs(layer, change[i])[None]))
        assert_exact(real(run, ends[i : i + 1]), real(run, to_the_end(run, before, layer, change[i : i + 1])))
    stream = before + change
    after, made = run.forward.block(layer, stream), run.forward.qkv(layer, run.normed(stream, layer))
    z = run.forward.apply(layer, made[0], made[1][:1], made[2])
    frozen = run.forward.qkv(layer, stream, frozen=True)
    for i in range(count):
        here = slice(i, i + 1)
        assert_exact(real(run, after[here]), real(run, run.forward.block(layer, stream[here])))
        alone = run.forward.qkv(layer, run.normed(stream[here], layer))
        for many, single in zip(made, alone, strict=True):
            assert_exact(real(run, many[here], True), real(run, single, True))
        mixed = run.forward.apply(layer, alone[0], made[1][:1], alone[2])
        assert_exact(real(run, z[here], True), real(run, mixed, True))
        for many, single in zip(frozen, run.forward.qkv(layer, stream[here], frozen=True), strict=True):
            assert_exact(real(run, many[here], True), real(run, single, True))


def check_parts(run):
    """A part's rerun is the whole's, of those sequences."""
    layer, stream = run.weights.n_layers - 1, noise(2, *run.embedded.shape)
    change = noise(2, *run.embedded.shape, seed=1)
    whole = run.forward.block(layer, stream, change)
    made = run.forward.qkv(layer, stream, frozen=True)
    z = run.forward.apply(layer, *made)
    for sequences in (slice(0, 1), slice(1, None)):
        part = run[sequences]
        assert_exact(
            real(part, part.forward.block(layer, stream[:, sequences], change[:, sequences])),
            real(part, whole[:, sequences]),
        )
        own = part.forward.qkv(layer, stream[:, sequences], frozen=True)
        for ours, theirs in zip(own, made, strict=True):
            assert_exact(real(part, ours, True), real(part, theirs[:, sequences], True))
        assert_exact(real(part, part.forward.apply(layer, *own), True), real(part, z[:, sequences], True))


def check_gradients(run):
    """Along one direction, by finite differences, through all that a rerun does."""
    layer = run.weights.n_layers - 1
    shape = (2, *run.embedded.shape)
    point, way, weigh = noise(2, *shape), noise(2, *shape, seed=1), noise(*shape, seed=2)

    def value(x):
        stream, change = x
        made = run.forward.qkv(layer, run.normed(stream, layer))
        z = run.forward.apply(layer, *made)
        end = run.forward.block(layer, stream, change)
        return (real(run, end) * real(run, weigh)).sum() + real(run, z, True).sin().sum()

    x = point.clone().requires_grad_()
    ours = (torch.autograd.grad(value(x), x)[0] * way).sum()
    step = 1e-6
    with torch.no_grad():
        expected = (value(point + step * way) - value(point - step * way)) / (2 * step)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert not run.forward.block(layer, point[0]).requires_grad  # the model's parameters are constants


def check_kept_as_queries_and_keys(run, other):
    """A run with store="qk" is the run with patterns, at real positions."""
    w = run.weights
    assert_exact(other.final[run.mask] if run.mask is not None else other.final, real(run, run.final[None])[0])
    for layer in range(w.n_layers):
        assert isinstance(other.patterns[layer], QKPattern)
        assert_exact(real(run, other.pattern(layer)[None], True), real(run, run.pattern(layer)[None], True))
    assert_exact(fc.order_losses(other), fc.order_losses(run))
    for path in ((), ((0, 1),), tuple((layer, layer % w.n_heads) for layer in range(w.n_layers))):
        assert_exact(real(run, fc.path_logits(other, path)[None]), real(run, fc.path_logits(run, path)[None]))
    stream, change = noise(2, 2, *run.embedded.shape)
    normed = run.normed(stream, 0)
    made, same = run.forward.qkv(0, normed), other.forward.qkv(0, normed)
    assert_exact(real(run, other.forward.apply(0, *same), True), real(run, run.forward.apply(0, *made), True))
    assert_exact(real(run, other.forward.block(0, stream, change)), real(run, run.forward.block(0, stream, change)))
