"""Names, types and rows of weights: what a checkpoint calls them and how GGUF has them.

Source: conversion/llama.py and gguf-py/gguf/tensor_mapping.py in llama.cpp. Matrices keep their dtype, all else is F32.
For arch "llama" the rows of queries and keys are put in another order: there rotary pairs are neighbours, (2i, 2i + 1),
in a checkpoint they are (i, i + half).
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(?P<i>0|[1-9]\d{0,5})\.(?P<part>[\w.]+)\.(?P<kind>weight|bias)")
# Computed from the config, by us too.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.masked_bias)")


class Heads(NamedTuple):
    """How many of queries, and of keys and values."""

    queries: int
    keys: int


def gguf_name(name: str) -> str | None:
    """GGUF's name of a weight; None if there is none."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.fullmatch(name)
    part = None if match is None else _IN_LAYER.get(match["part"])
    return None if match is None or part is None else f"blk.{match['i']}.{part}.{match['kind']}"


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's name of a weight, by GGUF's: the inverse of `gguf_name`."""
    top = {theirs: ours for ours, theirs in _TOP.items()}
    if name in top:
        return top[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    parts = {theirs: ours for ours, theirs in _IN_LAYER.items()}
    if match is None or match[2] not in parts:
        return None
    return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"


def heads_of_rows(arch: str, name: str, heads: Heads) -> int | None:
    """The number of heads whose rows are to be put in order, by a weight's GGUF name; None for none."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if arch != "llama" or match is None:
        return None
    return heads.queries if match[1] == "q" else heads.keys


def rotary_neighbours(rows: UInt8[np.ndarray, "rows nbytes"], heads: int) -> UInt8[np.ndarray, "rows nbytes"]:
    """Rows of `heads` heads with rotary pairs (i, i + half) as neighbours (2i, 2i + 1); a copy."""
    count, nbytes = rows.shape
    return rows.reshape(heads, 2, count // heads // 2, nbytes).swapaxes(1, 2).reshape(count, nbytes)


def rotary_halves(rows: Shaped[np.ndarray, "rows n"], heads: int) -> Shaped[np.ndarray, "rows n"]:
    """The inverse of `rotary_neighbours`, of rows of any numbers."""
    count, n = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, n).swapaxes(1, 2).reshape(count, n)
