"""Qwen 3: Llama with norms of every head's queries and keys, which show in the patterns of a run alone.

The QK circuits of the weights are those in front of these norms.
"""

from dataclasses import replace

from pyfastcircuits.adapters import llama

FAMILY = replace(llama.FAMILY, head_norms=("q_norm", "k_norm"))
