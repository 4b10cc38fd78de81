"""Dictionaries of features (sparse autoencoders, transcoders), whose features are nodes of a run.

A feature is a direction that is written as strongly as it is active: one number for each position, so that whatever
follows from it costs a vector and never a matrix of features by features or by the vocabulary.
"""

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import check_fields, describe, public
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.norms import centered, final_norm_gain, norm_scale
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Label
from pyfastcircuits.run.trace import FrozenTrace

Reads = Literal["stream", "mlp"]
TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_gate", "r_mag", "W_skip"}  # by their names in files


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of the residual stream before a layer (an SAE), or of a layer's MLP (a transcoder).

    A feature's activation is (x - b_dec) @ W_enc + b_enc where that is above its threshold, and 0 elsewhere; of the
    activations of a position, `top` keep the largest alone. A gated one (Rajamanoharan et al. 2024) is active where
    (x - b_dec) @ W_enc + b_gate is above 0, as strongly as (x - b_dec) @ W_enc * exp(r_mag) + b_enc is above 0.

    Args:
        W_enc, W_dec: [d, F] and [F, d].
        b_enc, b_dec: [F] and [d]; None: zeros.
        layer: whose residual stream, or whose MLP.
        reads: "stream": the stream that the layer reads, of which a feature writes a part. "mlp": what the MLP of the
            layer reads, through the model's norm without its gain; then a feature writes a part of the MLP's output.
        threshold: [F], what an activation must exceed (JumpReLU); None: 0.
        top: how many activations a position keeps; None: all.
        subtracts_b_dec: whether the encoder reads the stream less b_dec.
        b_gate, r_mag: [F], of a gated dictionary, whose b_enc is the bias of magnitudes; None: it is not gated.
        W_skip: [d, d], of a transcoder whose reconstruction has x @ W_skip.T in it too; it is no feature's.

    Raises:
        ValueError: shapes that do not fit, a layer or top below 0.
        TypeError: arguments of other types.

    Source: Bricken et al. 2023 (SAEs); Dunefsky et al. 2024 (transcoders); Paulo et al. 2025 (with a skip).
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    _: KW_ONLY
    layer: int
    reads: Reads = "stream"
    threshold: Tensor | None = None
    top: int | None = None
    subtracts_b_dec: bool = False
    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    W_skip: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes."""
        check_fields(self)
        if self.W_dec.dim() != 2 or not self.W_dec.is_floating_point():
            raise ValueError(f"W_dec is {describe(self.W_dec)}, expected floating point of [F, d]")
        features, d = self.W_dec.shape
        shapes = {"W_enc": [d, features], "b_dec": [d], "W_skip": [d, d]}
        shapes |= {name: [features] for name in ("b_enc", "threshold", "b_gate", "r_mag")}
        for name, shape in shapes.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shape} for W_dec [{features}, {d}]")
        if self.layer < 0 or (self.top is not None and self.top < 0):
            raise ValueError(f"layer is {self.layer} and top {self.top}, expected at least 0")

        if (self.b_gate is None) != (self.r_mag is None):
            missing = "r_mag" if self.r_mag is None else "b_gate"
            raise ValueError(f"{missing} is None, but a gated dictionary has both b_gate and r_mag")
        if self.b_gate is not None and self.threshold is not None:
            raise ValueError("threshold is given, but b_gate is too: a gated dictionary has no threshold")
        if self.W_skip is not None and self.reads != "mlp":
            raise ValueError(f"W_skip is given, but reads is {self.reads!r}: it is a transcoder's, which reads 'mlp'")

    @staticmethod
    @public
    def load(file: str | Path, *, layer: int, reads: Reads = "stream") -> "Dictionary":
        """Read a safetensors file in the layout of SAELens (with its cfg.json beside it) or of circuit-tracer.

        Args:
            file: a file, or a folder with one.
            layer, reads: see Dictionary.

        Raises:
            OSError: no such file.
            ValueError: a file without encoder and decoder; one that holds something else besides.
            ImportError: safetensors is missing.
        """
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("load needs the safetensors package: pip install safetensors") from error
        path = Path(file)
        if path.is_dir():
            found = sorted(path.glob("*.safetensors"))
            if len(found) != 1:
                raise ValueError(f"file is {describe(str(file))}, which has {len(found)} safetensors files: name one")
            path = found[0]
        if not path.is_file():
            raise OSError(f"file is {describe(str(file))}, where there is no file")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"file is {describe(str(file))}, which is no safetensors file: {error}") from error
        held = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        if not {"W_enc", "W_dec"} <= held.keys():
            raise ValueError(f"file is {describe(str(file))}, which holds {', '.join(held)}: expected W_enc and W_dec")
        if "scaling_factor" in held and bool((held["scaling_factor"] == 1).all()):  # SAELens keeps ones
            del held["scaling_factor"]
        if "b_mag" in held:  # SAELens' name of a gated one's
            held["b_enc"] = held.pop("b_mag")
        refused = held.keys() - TENSORS
        if refused:
            raise ValueError(f"file is {describe(str(file))}, which holds {', '.join(sorted(refused))}: not supported")
        settings = path.with_name("cfg.json")
        config = json.loads(settings.read_text()) if settings.is_file() else {}
        encoder, decoder = held["W_enc"], held["W_dec"]
        if encoder.shape == decoder.shape and encoder.shape[0] != encoder.shape[1]:  # circuit-tracer keeps it as [F, d]
            encoder = encoder.mT
        return Dictionary(
            encoder.contiguous(), decoder, held.get("b_enc"), held.get("b_dec"), layer=layer, reads=reads,
            threshold=held.get("threshold"), top=config.get("k"), b_gate=held.get("b_gate"), r_mag=held.get("r_mag"),
            W_skip=held.get("W_skip"),
            subtracts_b_dec=bool(config.get("apply_b_dec_to_input", False)),
        )  # fmt: skip

    @property
    def size(self) -> int:
        """F."""
        return len(self.W_dec)

    @public
    def activations(self, trace: FrozenTrace) -> Tensor:
        """How active every feature is at each position of a run, [B, T, F]; errors as `feature`."""
        self.check(trace.weights)
        return self._of(trace, self._read_by(trace))

    @public
    def reconstruction(self, trace: FrozenTrace) -> Tensor:
        """What the dictionary makes of the stream, or of the MLP's output, in a run: features, b_dec, skip; [B, T, d].

        What is left of the stream or output is the reconstruction's error. Errors as `feature`.
        """
        self.check(trace.weights)
        stream = self._read_by(trace)
        out = self._of(trace, stream) @ self.W_dec.to(stream.dtype)
        out = out if self.b_dec is None else out + self.b_dec.to(stream.dtype)
        return out if self.W_skip is None else out + self._read(trace, stream) @ self.W_skip.mT.to(stream.dtype)

    @public
    def feature(self, number: int) -> "Feature":
        """One feature as a node: `fc.head_ablation(run, heads=[dictionary.feature(7)])`.

        Raises:
            IndexError: no such feature.
        """
        if not 0 <= number < self.size:
            raise IndexError(f"number is {number}, but the dictionary has {self.size} features")
        return Feature(self, number)

    @public
    def to_logits(self, weights: CircuitWeights) -> FactoredMatrix:
        """What each feature adds to each token's logit for each unit of activation and of the final norm: [F, V'].

        It is not multiplied out: `fc.top_per_row(dictionary.to_logits(weights), 10)` gives each feature's tokens.

        Raises:
            ValueError: a dictionary of another d.
        """
        self.check(weights)
        dtype = weights.compute_dtype
        return FactoredMatrix(final_norm_gain(self.W_dec.to(dtype), weights), weights.W_U.to(dtype))

    @public
    def check(self, weights: CircuitWeights) -> None:
        """Raise ValueError or IndexError unless the dictionary is one of such a model."""
        if self.W_dec.shape[1] != weights.d_model:
            raise ValueError(f"W_dec has shape {list(self.W_dec.shape)}, but d is {weights.d_model}")
        if self.layer > weights.n_layers - (self.reads == "mlp"):
            raise IndexError(f"layer is {self.layer}, but the model has {weights.n_layers} layers")

    def _read_by(self, run: FrozenTrace) -> Tensor:
        """The stream [B, T, d] that the encoder reads in the clean run, before a norm."""
        stream = run.streams[self.layer]
        if self.reads == "stream" or run.forward.mlp_reads(self.layer) != "after heads":
            return stream
        return stream + run.forward.write(self.layer, run.z(self.layer).transpose(0, 1)[None])[0]

    def _read(self, run: FrozenTrace, stream: Tensor) -> Tensor:
        """What the encoder multiplies where it reads a stream [..., d]: of a transcoder, through the model's norm."""
        if self.reads == "stream":
            return stream
        return centered(stream, run.weights) * norm_scale(stream, run.weights)[..., None]

    def _of(self, run: FrozenTrace, stream: Tensor, number: int | None = None) -> Tensor:
        """Activations [..., F], or [..., 1] of one feature, where the encoder reads a stream [..., d]."""
        dtype, stream = stream.dtype, self._read(run, stream)
        if self.subtracts_b_dec and self.b_dec is not None:
            stream = stream - self.b_dec.to(dtype)
        some = slice(None) if number is None or self.top is not None else slice(number, number + 1)
        made = stream @ self.W_enc[:, some].to(dtype)
        passed = None if self.b_gate is None else made + self.b_gate[some].to(dtype) > 0
        made = made if self.r_mag is None else made * self.r_mag[some].to(dtype).exp()
        made = made if self.b_enc is None else made + self.b_enc[some].to(dtype)
        above = made > (0 if self.threshold is None else self.threshold[some].to(dtype))
        active = made.where(above if passed is None else above & passed, 0)
        if self.top is not None and self.top < self.size:
            kept = active.topk(self.top, -1)
            active = torch.zeros_like(active).scatter(-1, kept.indices, kept.values)
            active = active if number is None else active[..., number : number + 1]
        return active


@dataclass(frozen=True)
class Feature:
    """One feature of a dictionary, as a node: it writes its direction as strongly as it is active."""

    dictionary: Dictionary
    number: int
    index: ClassVar[int] = 0

    @property
    def layer(self) -> int:
        """See Node: features of a stream are written before its layer reads."""
        return self.dictionary.layer - (self.dictionary.reads == "stream")

    @property
    def label(self) -> Label:
        """See Node."""
        return f"feature {self.dictionary.layer}.{self.number}"

    @property
    def outputs(self) -> "Feature":
        """See Node."""
        return self

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See Outputs: its activations, [1, B, T, 1]."""
        return self.activation(run, self.dictionary._read_by(run))[None]

    def activation(self, run: FrozenTrace, stream: Tensor) -> Tensor:
        """Its activations [..., 1] where the encoder reads a stream [..., d]."""
        return self.dictionary._of(run, stream, self.number)

    def write(self, run: FrozenTrace, output: Tensor) -> Tensor:
        """See Node."""
        return output * self.dictionary.W_dec[self.number].to(output.dtype)
