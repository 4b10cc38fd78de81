"""Transformer-circuit analysis as fused kernels ("A Mathematical Framework for Transformer Circuits", 2021)."""

from pyfastcircuits import ops
from pyfastcircuits._library import build_info
from pyfastcircuits.ablation import AblationResult, head_ablation, pair_ablation, path_ablation
from pyfastcircuits.composition import (
    ComponentScores,
    CompositionBaseline,
    component_scores,
    composition_baseline,
    composition_scores,
    composition_z_scores,
)
from pyfastcircuits.factored import FactoredMatrix
from pyfastcircuits.paths import (
    LayerMarginals,
    count_paths,
    enumerate_paths,
    layer_marginals,
    order_losses,
    path_logits,
)
from pyfastcircuits.trace import FrozenTrace, trace
from pyfastcircuits.weights import CircuitWeights, load_weights

__version__ = "0.1.0"
__all__ = [
    "AblationResult",
    "CircuitWeights",
    "ComponentScores",
    "CompositionBaseline",
    "FactoredMatrix",
    "FrozenTrace",
    "LayerMarginals",
    "build_info",
    "component_scores",
    "composition_baseline",
    "composition_scores",
    "composition_z_scores",
    "count_paths",
    "enumerate_paths",
    "head_ablation",
    "layer_marginals",
    "load_weights",
    "ops",
    "order_losses",
    "pair_ablation",
    "path_ablation",
    "path_logits",
    "trace",
]
