"""Transformer-circuit analysis as fused kernels ("A Mathematical Framework for Transformer Circuits", 2021).

The names by what they are for, in the order in which an analysis goes:

| step | names |
|---|---|
| a model's weights | CircuitWeights, load_weights, center, fold_norm, fold_value_biases |
| one frozen run | trace -> FrozenTrace |
| path expansion | order_losses, layer_marginals, path_logits, count_paths, enumerate_paths -> LayerMarginals |
| ablation | sweep -> Sweep; head_, layer_, pair_, path_, composition_ablation -> Result |
| patching two runs | activation_patching, path_patching, edge_attribution -> Result |
| attribution | direct_logit_attribution, logit_lens, project -> Result; qk_terms -> QKTerms |
| metrics, for `metric=` | NLL, KL, LogitDifference, Probability, Rank, Top1 |
| known heads | head_scores, induction_heads -> Result |
| circuits over the vocabulary | bigrams, ov_circuit, qk_circuit, composed_qk_circuit -> FactoredMatrix; |
| | ov_tables, qk_tables |
| their entries | top_entries, top_per_row, diagonal_ranks, skip_trigrams, copying_accuracy |
| their spectra | circuit_eigenvalues, composed_eigenvalues, copying_scores, qk_positivity, positivity, trace_ratios, |
| | effective_rank, diagonal_statistics |
| composition of two heads | composition_scores, composition_baseline, composition_z_scores, component_scores, |
| | virtual_weights, virtual_head, subspaces |
| the kernels beneath | ops; build_info says what this build and machine can do |
"""

from pyfastcircuits import ops as ops
from pyfastcircuits.adapters.files import load_weights as load_weights
from pyfastcircuits.adapters.tracing import trace as trace
from pyfastcircuits.circuits.composition import ComponentScores as ComponentScores
from pyfastcircuits.circuits.composition import component_scores as component_scores
from pyfastcircuits.circuits.composition import composition_scores as composition_scores
from pyfastcircuits.circuits.composition_baseline import CompositionBaseline as CompositionBaseline
from pyfastcircuits.circuits.composition_baseline import composition_baseline as composition_baseline
from pyfastcircuits.circuits.composition_baseline import composition_z_scores as composition_z_scores
from pyfastcircuits.circuits.skip_trigrams import SkipTrigram as SkipTrigram
from pyfastcircuits.circuits.skip_trigrams import SkipTrigrams as SkipTrigrams
from pyfastcircuits.circuits.skip_trigrams import skip_trigrams as skip_trigrams
from pyfastcircuits.circuits.spectra import DiagonalStatistics as DiagonalStatistics
from pyfastcircuits.circuits.spectra import circuit_eigenvalues as circuit_eigenvalues
from pyfastcircuits.circuits.spectra import composed_eigenvalues as composed_eigenvalues
from pyfastcircuits.circuits.spectra import copying_scores as copying_scores
from pyfastcircuits.circuits.spectra import diagonal_statistics as diagonal_statistics
from pyfastcircuits.circuits.spectra import effective_rank as effective_rank
from pyfastcircuits.circuits.spectra import positivity as positivity
from pyfastcircuits.circuits.spectra import qk_positivity as qk_positivity
from pyfastcircuits.circuits.spectra import trace_ratios as trace_ratios
from pyfastcircuits.circuits.subspaces import Subspaces as Subspaces
from pyfastcircuits.circuits.subspaces import subspaces as subspaces
from pyfastcircuits.circuits.tables import CopyingAccuracy as CopyingAccuracy
from pyfastcircuits.circuits.tables import copying_accuracy as copying_accuracy
from pyfastcircuits.circuits.tables import diagonal_ranks as diagonal_ranks
from pyfastcircuits.circuits.tables import top_entries as top_entries
from pyfastcircuits.circuits.tables import top_per_row as top_per_row
from pyfastcircuits.circuits.virtual import VirtualHead as VirtualHead
from pyfastcircuits.circuits.virtual import virtual_head as virtual_head
from pyfastcircuits.circuits.virtual import virtual_weights as virtual_weights
from pyfastcircuits.circuits.vocabulary import OVTables as OVTables
from pyfastcircuits.circuits.vocabulary import QKTables as QKTables
from pyfastcircuits.circuits.vocabulary import bigrams as bigrams
from pyfastcircuits.circuits.vocabulary import composed_qk_circuit as composed_qk_circuit
from pyfastcircuits.circuits.vocabulary import ov_circuit as ov_circuit
from pyfastcircuits.circuits.vocabulary import ov_tables as ov_tables
from pyfastcircuits.circuits.vocabulary import qk_circuit as qk_circuit
from pyfastcircuits.circuits.vocabulary import qk_tables as qk_tables
from pyfastcircuits.experiments.ablation import head_ablation as head_ablation
from pyfastcircuits.experiments.ablation import layer_ablation as layer_ablation
from pyfastcircuits.experiments.ablation import pair_ablation as pair_ablation
from pyfastcircuits.experiments.ablation import path_ablation as path_ablation
from pyfastcircuits.experiments.attention_scores import QKTerms as QKTerms
from pyfastcircuits.experiments.attention_scores import qk_terms as qk_terms
from pyfastcircuits.experiments.attribution import direct_logit_attribution as direct_logit_attribution
from pyfastcircuits.experiments.attribution import logit_lens as logit_lens
from pyfastcircuits.experiments.attribution import project as project
from pyfastcircuits.experiments.heads import head_scores as head_scores
from pyfastcircuits.experiments.heads import induction_heads as induction_heads
from pyfastcircuits.experiments.metrics import KL as KL
from pyfastcircuits.experiments.metrics import NLL as NLL
from pyfastcircuits.experiments.metrics import LogitDifference as LogitDifference
from pyfastcircuits.experiments.metrics import Probability as Probability
from pyfastcircuits.experiments.metrics import Rank as Rank
from pyfastcircuits.experiments.metrics import Top1 as Top1
from pyfastcircuits.experiments.patching import activation_patching as activation_patching
from pyfastcircuits.experiments.patching import composition_ablation as composition_ablation
from pyfastcircuits.experiments.patching import edge_attribution as edge_attribution
from pyfastcircuits.experiments.patching import path_patching as path_patching
from pyfastcircuits.experiments.sweep import Sweep as Sweep
from pyfastcircuits.experiments.sweep import sweep as sweep
from pyfastcircuits.model.factored import FactoredMatrix as FactoredMatrix
from pyfastcircuits.model.folding import center as center
from pyfastcircuits.model.folding import fold_norm as fold_norm
from pyfastcircuits.model.folding import fold_value_biases as fold_value_biases
from pyfastcircuits.model.weights import CircuitWeights as CircuitWeights
from pyfastcircuits.ops.library import build_info as build_info
from pyfastcircuits.result import Result as Result
from pyfastcircuits.run.paths import LayerMarginals as LayerMarginals
from pyfastcircuits.run.paths import count_paths as count_paths
from pyfastcircuits.run.paths import enumerate_paths as enumerate_paths
from pyfastcircuits.run.paths import layer_marginals as layer_marginals
from pyfastcircuits.run.paths import order_losses as order_losses
from pyfastcircuits.run.paths import path_logits as path_logits
from pyfastcircuits.run.trace import FrozenTrace as FrozenTrace

__version__ = "0.1.0"
__all__ = ["ops", *(name for name, value in globals().items() if callable(value))]  # all that is imported here
