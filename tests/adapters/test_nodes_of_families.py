"""MLPs, embeddings and positions as nodes of experiments: what a plain rerun with hooks gives, on four kinds of block."""

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, nothing_in_fp32, tokens
from support.plain import Plain

import pyfastcircuits as fc

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = [
    "gpt2",
    "pythia",
    "llama 3, grouped",
    "gemma2, caps that bite",
]  # MLP behind and beside heads; norms behind both


def nll(logits, given):
    return -logits[:, :-1].log_softmax(-1).gather(-1, given[:, 1:, None])[..., 0]


def exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.fixture(params=KINDS)
def made(request):
    model = build(request.param)
    with nothing_in_fp32(model):
        given = tokens(2)
        yield fc.trace(model, given), Plain(model, given), given


def put(value, places=slice(None)):
    """Of an output, another value at some positions."""

    def change(out):
        out = out.clone()
        out[:, places] = value[:, places] if isinstance(value, torch.Tensor) else value
        return out

    return change


def test_nodes_are_ablated_as_by_hooks(made):
    run, plain, given = made
    heads = [("mlp", 1), [("mlp", 0), (1, 2)], "embed", [(0, 1), ("mlp", 0), ("mlp", 2)], (1, 0)]
    ours = fc.head_ablation(run, "resample", "recomputed", heads=heads, per_token=True)
    mlp = {layer: put(plain.kept[layer, "mlp"].roll(1, 0)) for layer in range(3)}
    z = {at: value.roll(1, 0) for at, value in plain.clean_z.items()}
    stream = {0: put(plain.clean_streams[0].roll(1, 0))}
    theirs = [
        plain.run(mlp={1: mlp[1]}),
        plain.run(mlp={0: mlp[0]}, z={(1, 2): z[1, 2]}),
        plain.run(layer=stream),
        plain.run(mlp={0: mlp[0], 2: mlp[2]}, z={(0, 1): z[0, 1]}),
        plain.run(z={(1, 0): z[1, 0]}),
    ]
    for value, logits in zip(ours.values, theirs, strict=True):
        exact(value, nll(logits, given))
    assert ours.labels[:3] == [("mlp", 1), frozenset({("mlp", 0), (1, 2)}), "embed"]
    zero = fc.head_ablation(run, "zero", "recomputed", heads=[("mlp", 2)], per_token=True)
    exact(zero.values[0], nll(plain.run(mlp={2: put(0)}), given))


def test_frozen_ablation_passes_through_later_heads_alone(made):
    run, plain, given = made
    result = fc.head_ablation(run, heads=[("mlp", 0), "embed"], per_token=True)
    exact(result.values[0], nll(plain.run(mlp={0: put(0)}, frozen=True), given))
    exact(result.values[1], nll(plain.run(layer={0: put(0)}, frozen=True), given))


@pytest.mark.parametrize("at", [4, [-1, 2], torch.tensor([[0] * 7 + [1] * 4, [1] * 3 + [0] * 8]).bool()])
def test_outputs_are_taken_out_at_some_positions(made, at):
    run, plain, given = made
    mask = torch.zeros(2, 11, dtype=torch.bool)
    if isinstance(at, torch.Tensor):
        mask = at
    else:
        mask[:, at] = True
    heads = [("mlp", 1), [("mlp", 0), (1, 2)], (0, 2)]
    ours = fc.head_ablation(run, "resample", "recomputed", heads=heads, at=at, per_token=True)

    def changed(own, other):
        return torch.where(mask[..., None], other, own)

    mlp = {i: (lambda out, i=i: changed(out.view(2, 11, -1), plain.kept[i, "mlp"].view(2, 11, -1).roll(1, 0)).view(out.shape)) for i in range(3)}  # fmt: skip
    first = plain.run(mlp={1: mlp[1]})
    exact(ours.values[0], nll(first, given))
    z = changed(plain.clean_z[0, 2], plain.clean_z[0, 2].roll(1, 0))
    exact(ours.values[2], nll(plain.run(z={(0, 2): z}), given))
    plain.run(mlp={0: mlp[0]})
    z = changed(plain.z[1, 2], plain.clean_z[1, 2].roll(1, 0))
    exact(ours.values[1], nll(plain.run(mlp={0: mlp[0]}, z={(1, 2): z}), given))


def test_each_position_on_its_own(made):
    run, _, _ = made
    heads = [("mlp", 1), [("mlp", 0), (1, 2)], (2, 2), "embed"]
    for attention in ("frozen", "recomputed"):
        ours = fc.head_ablation(run, "resample", attention, heads=heads, at="each")
        alone = [fc.head_ablation(run, "resample", attention, heads=heads, at=t).values for t in range(11)]
        exact(ours.values, torch.stack(alone, 1))
        assert ours.labels[12] == (frozenset({("mlp", 0), (1, 2)}), 1)
    one = fc.head_ablation(run, "mean", effect="direct", heads=[("mlp", 1), (0, 2)], at="each", positions=5)
    assert one.values.shape == (2, 11)
    whole = fc.head_ablation(run, "mean", effect="direct", heads=[("mlp", 1), (0, 2)], positions=5)
    exact(one.values[:, 5], whole.values)
    assert float((one.delta.abs() > 1e-12).sum()) == 2


def test_edges_of_any_node_to_any_receiver(made):
    run, plain, given = made
    fresh = fc.trace(plain.model, given.roll(1, 0))
    wrote = {node: written - other for node, written, other in zip(("embed", 0, 1), node_writes(run), node_writes(fresh), strict=True)}  # fmt: skip
    pairs = [("embed", (1, 2)), (("mlp", 0), (2, 1)), (("mlp", 0), ((1, 0), "V")), ("embed", "logits")]
    ours = fc.path_patching(run, fresh, "Q", direction="noise", pairs=pairs, per_token=True)
    theirs = [
        plain.run(inputs={(1, 2, "Q"): plain.clean_streams[1] - wrote["embed"]}),
        plain.run(inputs={(2, 1, "Q"): plain.clean_streams[2] - wrote[0]}),
    ]
    for value, logits in zip(ours.values, theirs, strict=False):
        exact(value, nll(logits, given))
    if run.weights.W_V.shape[1] == run.weights.n_heads:
        logits = plain.run(inputs={(1, 0, "V"): plain.clean_streams[1] - wrote[0]})
        exact(ours.values[2], nll(logits, given))
    assert ours.labels == [("embed", (1, 2)), (("mlp", 0), (2, 1)), (("mlp", 0), ((1, 0), "V")), ("embed", "logits")]
    direct = fc.head_ablation(run, "resample", "frozen", effect="direct", heads=["embed"], reference=fresh, final_norm="recomputed", per_token=True)  # fmt: skip
    exact(ours.values[3], direct.values[0])

    reads = run.forward.mlp_reads(2)
    stream = run.streams[2] - wrote[1]
    middle = stream + (run.forward.write(2, run.z(2).transpose(0, 1)[None])[0] if reads == "after heads" else 0)
    written = run.forward.mlp(2, middle[None])[0]
    final = run.final - (run.streams[3] - run.streams[2] - run.forward.write(2, run.z(2).transpose(0, 1)[None])[0]) + written  # fmt: skip
    mlp = fc.path_patching(run, fresh, "Q", direction="noise", pairs=[(("mlp", 1), ("mlp", 2))], per_token=True)
    lens = fc.logit_lens(run, per_token=True)
    assert lens.values.shape[0] == 4
    removed = run.final - final
    from pyfastcircuits.experiments.intervention import Intervention
    from pyfastcircuits.experiments.measure import measure
    from pyfastcircuits.experiments.options import measurement

    gone = Intervention(places=[0], items=[0], remove=lambda part, items: removed[part.sequences][None])
    exact(mlp.values, measure(run, [gone], measurement(run, {"per_token": True}, "recomputed"), [0]).values)
    with pytest.raises(ValueError, match="layers must increase"):
        fc.path_patching(run, fresh, "Q", pairs=[(("mlp", 1), (1, 0))])


def node_writes(run):
    from pyfastcircuits.run.nodes import MLP, Embedding, written

    return [written(run, node) for node in (Embedding(), MLP(0), MLP(1))]


def test_a_feature_of_a_transcoder_is_taken_out_of_the_mlp(tmp_path):
    """In circuit-tracer's layout, with a skip, which is left in as the reconstruction's error is."""
    model, given = build("gpt2"), tokens(2)
    with nothing_in_fp32(model):
        run, plain = fc.trace(model, given), Plain(model, given)
        g = torch.Generator().manual_seed(0)
        encoder, decoder = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((24, 7), (7, 24)))
        skip = torch.randn(24, 24, generator=g, dtype=torch.float64)
        bias = torch.randn(24, generator=g, dtype=torch.float64)
        tensors = {"W_enc": encoder.mT.contiguous(), "W_dec": decoder, "b_dec": bias, "W_skip": skip}
        save_file(tensors, tmp_path / "layer_1.safetensors")
        dictionary = fc.Dictionary.load(tmp_path, layer=1, reads="mlp")
        middle = run.streams[1] + run.forward.write(1, run.z(1).transpose(0, 1)[None])[0]
        read = torch.nn.functional.layer_norm(middle, (24,), eps=1e-5)
        active = (read @ encoder).clamp_min(0)
        exact(dictionary.activations(run), active)
        exact(dictionary.reconstruction(run), active @ decoder + bias + torch.einsum("btd,ed->bte", read, skip))
        gone = active[..., 3:4] * decoder[3]
        ours = fc.head_ablation(run, "zero", "recomputed", heads=[dictionary.feature(3)], per_token=True)
        exact(ours.values[0], nll(plain.run(mlp={1: lambda out: out - gone}), given))
