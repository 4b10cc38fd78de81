"""Qwen 3: Llama with norms of every head's queries and keys, which are in the patterns of a run.

QK circuits read from the weights alone are those in front of these norms.
"""

from pyfastcircuits.adapters.llama import FAMILY

__all__ = ["FAMILY"]
