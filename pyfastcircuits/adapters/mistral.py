"""Mistral: Llama with a sliding window, which is in the patterns of a run."""

from pyfastcircuits.adapters.llama import FAMILY

__all__ = ["FAMILY"]
