"""Runs on which bounds and searches are tried: kind ones, and such as bounds find hard."""

from dataclasses import replace

import torch

import pyfastcircuits as fc
from support.random_models import random_tokens, random_weights


def run_of(kind: str, layers: int = 3, dtype: torch.dtype = torch.float64) -> fc.FrozenTrace:
    """A small run: "plain", or with one thing about it that is hard."""
    options = {"norm": "rmsnorm", "heads": 4, "kv": 2, "d": 20, "r": 5, "dtype": dtype, "layers": layers}
    tokens, mask, store = random_tokens(3, 7), None, "patterns"
    if kind == "layernorm":
        options["norm"] = "layernorm"
    weights = random_weights(**options)
    if kind == "huge":  # effects of tens of nats
        weights = replace(weights, W_O=weights.W_O * 6, W_U=weights.W_U * 4)
    if kind == "outlier":  # one token's column is far longer than all others, and its probability is next to nothing
        W_U, b_U = weights.W_U.clone(), weights.b_U.clone()
        W_U[:, 5] *= 40
        b_U[5] -= 60
        weights = replace(weights, W_U=W_U, b_U=b_U)
    if kind == "shared":  # nearly all of every column is the same: no loss depends on it
        weights = replace(weights, W_U=weights.W_U + 50)
    if kind == "silent":  # heads that write nothing, and two that are the same
        W_O = weights.W_O.clone()
        W_O[:, 0], W_O[1, 2] = 0, W_O[1, 3]
        weights = replace(weights, W_O=W_O)
    if kind == "certain":  # probabilities of 0 and 1
        weights = replace(weights, W_U=weights.W_U * 200)
    if kind == "masked":
        mask = torch.ones(3, 7, dtype=torch.bool)
        mask[0, :3] = False
        store = "qk"
    return fc.trace(weights, tokens, mask, store=store)


KINDS = ("plain", "layernorm", "huge", "outlier", "shared", "silent", "certain", "masked")
