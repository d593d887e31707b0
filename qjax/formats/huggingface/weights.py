"""Names, types and rows of weights: what a checkpoint calls them and how GGUF has them.

Source: conversion/llama.py and gguf-py/gguf/tensor_mapping.py in llama.cpp. Matrices keep their dtype, all else is F32.
For arch "llama" the rows of queries and keys are put in another order: there rotary pairs are neighbours, (2i, 2i + 1),
in a checkpoint they are (i, i + half).
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from qjax.formats.huggingface.config import Config

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
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
# One module in place of several, whose rows stand one after the other.
_FUSED = {"self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"), "mlp.gate_up_proj": ("ffn_gate", "ffn_up")}
_LAYER = re.compile(r"model\.layers\.(?P<i>0|[1-9]\d{0,5})\.(?P<part>[\w.]+)")
# Computed from the config, by us too.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.masked_bias)")


class Heads(NamedTuple):
    """How many of queries, and of keys and values."""

    queries: int
    keys: int


class Place(NamedTuple):
    """A module under its GGUF name without ".weight"; `rows` of it, None for all."""

    name: str
    rows: slice | None

    @property
    def part(self) -> str:
        """The name's last part, the same in every layer."""
        return self.name.rpartition(".")[2]


def heads_of(config: Config) -> Heads:
    """Heads by the config.

    Raises:
        FormatError: they are no numbers.
    """
    queries = config.count("num_attention_heads")
    return Heads(queries, config.count("num_key_value_heads", queries))


def matrix_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """[out, in] of each matrix by the config, by the GGUF name's last part.

    Raises:
        FormatError: what the config says are no numbers.
    """
    heads, hidden, ffn = heads_of(config), config.count("hidden_size"), config.count("intermediate_size")
    queries, keys = heads.queries * config.head_dim, heads.keys * config.head_dim
    vocabulary = config.count("vocab_size")
    return {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
        "token_embd": (vocabulary, hidden),
        "output": (vocabulary, hidden),
    }


def places(module: str, shapes: dict[str, tuple[int, int]]) -> tuple[Place, ...]:
    """What a module is, by its name; several for a fused one, () for none that is known."""
    if module in _TOP:
        return (Place(_TOP[module], None),)
    match = _LAYER.fullmatch(module)
    if match is None:
        return ()
    if match["part"] in _IN_LAYER:
        return (Place(f"blk.{match['i']}.{_IN_LAYER[match['part']]}", None),)
    found, start = [], 0
    for part in _FUSED.get(match["part"], ()):
        rows = shapes[part][0]
        found.append(Place(f"blk.{match['i']}.{part}", slice(start, start + rows)))
        start += rows
    return tuple(found)


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's name of a weight, by GGUF's; None if there is none."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    known = _TOP if match is None else _IN_LAYER
    part = next((ours for ours, theirs in known.items() if theirs == (stem if match is None else match[2])), None)
    if part is None:
        return None
    return f"{part}.{suffix}" if match is None else f"model.layers.{match[1]}.{part}.{suffix}"


def module_name(name: str) -> str | None:
    """The Hugging Face module of a weight or bias, by its GGUF name; None if there is none.

    "blk.0.ffn_up.weight" is of "model.layers.0.mlp.up_proj".
    """
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return next((theirs.removesuffix(".weight") for theirs, ours in _TOP.items() if ours == name), None)
    return next((f"model.layers.{match[1]}.{part}" for part, ours in _IN_LAYER.items() if ours == match[2]), None)


def heads_of_rows(arch: str, name: str, heads: Heads) -> int | None:
    """The number of heads whose rows are to be put in order, by a weight's GGUF name; None for none."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if arch != "llama" or match is None:
        return None
    return heads.queries if match[1] == "q" else heads.keys


def rotary_neighbours(rows: int, heads: int) -> Int64[np.ndarray, " rows"]:
    """The order of `rows` rows of `heads` heads in which rotary pairs (i, i + half) are neighbours (2i, 2i + 1)."""
    return np.arange(rows, dtype=np.int64).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def rotary_halves(rows: int, heads: int) -> Int64[np.ndarray, " rows"]:
    """The inverse order of `rotary_neighbours`."""
    return np.arange(rows, dtype=np.int64).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
