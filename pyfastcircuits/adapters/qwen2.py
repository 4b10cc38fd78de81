"""Qwen 2 and 2.5: Llama with biases of queries, keys and values."""

from dataclasses import replace
from functools import partial

from pyfastcircuits.adapters import llama

FAMILY = replace(llama.FAMILY, read=partial(llama.read, qkv_bias=True))
