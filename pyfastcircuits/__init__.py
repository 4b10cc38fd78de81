"""Transformer-circuit analysis as fused kernels ("A Mathematical Framework for Transformer Circuits", 2021).

The names by what they are for, in the order in which an analysis goes:

| step | names |
|---|---|
| a model's weights | CircuitWeights, load_weights; process_weights, center, fold_norm, fold_value_biases |
| one frozen run | trace -> FrozenTrace |
| path expansion | order_losses, layer_marginals, path_logits, count_paths, enumerate_paths -> LayerMarginals |
| before a sweep | plan -> Plan |
| ablation | sweep -> Sweep, over a corpus -> Corpus too; head_, layer_, pair_, path_, composition_ablation -> Result |
| deep models | top_paths -> PathSearch; sample_paths -> PathSample; path_groups -> PathGroups; |
| | screened_pairs -> ScreenedPairs |
| patching two runs | activation_patching, path_patching, edge_attribution -> Result |
| attribution | direct_logit_attribution, logit_lens, project -> Result; qk_terms -> QKTerms |
| features of an SAE or transcoder | Dictionary; feature_attribution -> Result, feature_reads, feature_qk_terms |
| metrics, for `metric=` | NLL, KL, LogitDifference, Probability, Rank, Top1 |
| circuits of edges | edge_scores -> EdgeScores; circuit -> Circuit; faithfulness -> Faithfulness; prune_circuit; Task |
| known heads | head_scores, induction_heads -> Result |
| circuits over the vocabulary | bigrams, ov_circuit, qk_circuit, composed_qk_circuit -> FactoredMatrix; |
| | ov_tables, qk_tables |
| their entries | top_entries, top_per_row, diagonal_ranks, skip_trigrams, copying_accuracy |
| their spectra | circuit_eigenvalues, composed_eigenvalues, copying_scores, qk_positivity, positivity, trace_ratios, |
| | effective_rank, diagonal_statistics |
| composition of two heads | composition_scores, composition_baseline, composition_z_scores, component_scores, |
| | virtual_weights, virtual_head, subspaces |
| figures | plot, imported when it is first used; `.plot()` of each finding |
| one page with all of this | report writes it as HTML |
| the kernels beneath | ops; build_info says what this build and machine can do |
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyfastcircuits import ops
from pyfastcircuits.adapters.files import load_weights
from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.circuits.composition import ComponentScores, component_scores, composition_scores
from pyfastcircuits.circuits.composition_baseline import (
    CompositionBaseline,
    composition_baseline,
    composition_z_scores,
)
from pyfastcircuits.circuits.skip_trigrams import SkipTrigram, SkipTrigrams, skip_trigrams
from pyfastcircuits.circuits.spectra import (
    DiagonalStatistics,
    circuit_eigenvalues,
    composed_eigenvalues,
    copying_scores,
    diagonal_statistics,
    effective_rank,
    positivity,
    qk_positivity,
    trace_ratios,
)
from pyfastcircuits.circuits.subspaces import Subspaces, subspaces
from pyfastcircuits.circuits.tables import (
    CopyingAccuracy,
    copying_accuracy,
    diagonal_ranks,
    top_entries,
    top_per_row,
)
from pyfastcircuits.circuits.virtual import VirtualHead, virtual_head, virtual_weights
from pyfastcircuits.circuits.vocabulary import (
    OVTables,
    QKTables,
    bigrams,
    composed_qk_circuit,
    ov_circuit,
    ov_tables,
    qk_circuit,
    qk_tables,
)
from pyfastcircuits.experiments.ablation import head_ablation, layer_ablation, pair_ablation, path_ablation
from pyfastcircuits.experiments.attention_scores import QKTerms, qk_terms
from pyfastcircuits.experiments.attribution import direct_logit_attribution, logit_lens, project
from pyfastcircuits.experiments.circuit import Circuit, Overlap, circuit
from pyfastcircuits.experiments.edge_scores import EdgeScores, WrongScore, edge_scores
from pyfastcircuits.experiments.faithfulness import Curve, Faithfulness, faithfulness, prune_circuit
from pyfastcircuits.experiments.features import feature_attribution, feature_qk_terms, feature_reads
from pyfastcircuits.experiments.heads import head_scores, induction_heads
from pyfastcircuits.experiments.metrics import KL, NLL, LogitDifference, Probability, Rank, Top1
from pyfastcircuits.experiments.orders import LayerMarginals, layer_marginals, order_losses
from pyfastcircuits.experiments.patching import (
    activation_patching,
    composition_ablation,
    edge_attribution,
    path_patching,
)
from pyfastcircuits.experiments.path_groups import PathGroups, path_groups
from pyfastcircuits.experiments.path_sampling import PathSample, sample_paths
from pyfastcircuits.experiments.path_search import PathSearch, top_paths
from pyfastcircuits.experiments.screen import ScreenedPairs, screened_pairs
from pyfastcircuits.experiments.task import Task
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.folding import center, fold_norm, fold_value_biases
from pyfastcircuits.model.processing import process_weights
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops.library import build_info
from pyfastcircuits.reports.make import report
from pyfastcircuits.result import Result
from pyfastcircuits.run.dictionary import Dictionary
from pyfastcircuits.run.paths import count_paths, enumerate_paths, path_logits
from pyfastcircuits.run.trace import FrozenTrace
from pyfastcircuits.sweeps.corpus import Corpus, corpus
from pyfastcircuits.sweeps.plan import Plan, plan
from pyfastcircuits.sweeps.sweep import Sweep, sweep

if TYPE_CHECKING:
    from pyfastcircuits import plot as plot

__version__ = "0.1.0"
__all__ = [
    "KL",
    "NLL",
    "Circuit",
    "CircuitWeights",
    "ComponentScores",
    "CompositionBaseline",
    "CopyingAccuracy",
    "Corpus",
    "Curve",
    "DiagonalStatistics",
    "Dictionary",
    "EdgeScores",
    "FactoredMatrix",
    "Faithfulness",
    "FrozenTrace",
    "LayerMarginals",
    "LogitDifference",
    "OVTables",
    "Overlap",
    "PathGroups",
    "PathSample",
    "PathSearch",
    "Plan",
    "Probability",
    "QKTables",
    "QKTerms",
    "Rank",
    "Result",
    "ScreenedPairs",
    "SkipTrigram",
    "SkipTrigrams",
    "Subspaces",
    "Sweep",
    "Task",
    "Top1",
    "VirtualHead",
    "WrongScore",
    "activation_patching",
    "bigrams",
    "build_info",
    "center",
    "circuit",
    "circuit_eigenvalues",
    "component_scores",
    "composed_eigenvalues",
    "composed_qk_circuit",
    "composition_ablation",
    "composition_baseline",
    "composition_scores",
    "composition_z_scores",
    "copying_accuracy",
    "copying_scores",
    "corpus",
    "count_paths",
    "diagonal_ranks",
    "diagonal_statistics",
    "direct_logit_attribution",
    "edge_attribution",
    "edge_scores",
    "effective_rank",
    "enumerate_paths",
    "faithfulness",
    "feature_attribution",
    "feature_qk_terms",
    "feature_reads",
    "fold_norm",
    "fold_value_biases",
    "head_ablation",
    "head_scores",
    "induction_heads",
    "layer_ablation",
    "layer_marginals",
    "load_weights",
    "logit_lens",
    "ops",
    "order_losses",
    "ov_circuit",
    "ov_tables",
    "pair_ablation",
    "path_ablation",
    "path_groups",
    "path_logits",
    "path_patching",
    "plan",
    "positivity",
    "process_weights",
    "project",
    "prune_circuit",
    "qk_circuit",
    "qk_positivity",
    "qk_tables",
    "qk_terms",
    "report",
    "sample_paths",
    "screened_pairs",
    "skip_trigrams",
    "subspaces",
    "sweep",
    "top_entries",
    "top_paths",
    "top_per_row",
    "trace",
    "trace_ratios",
    "virtual_head",
    "virtual_weights",
]


def __getattr__(name: str) -> Any:
    """`plot`, which imports matplotlib: only when it is asked for."""
    if name == "plot":
        return import_module("pyfastcircuits.plot")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "plot"]
