"""Mistral: Llama with a sliding window, which shows in the patterns of a run alone."""

from pyfastcircuits.adapters import llama

FAMILY = llama.FAMILY
