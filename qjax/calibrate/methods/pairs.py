"""Which weights of a block share an input, and what that input's scale can be folded into.

A scale s for each column of the input is exact where what gives the input is divided by it: the weight of a norm, the
rows of the values' matrix (each head's output is a mean of values), the rows of ffn_up (SwiGLU multiplies by it). Under
grouped-query attention the heads that share their values share their scales: Lin et al. 2024 and their code leave
attn_output out there, which is not needed.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from qjax.arrays import QuantizedArray, TransformedArray
from qjax.calibrate.blocks import Weights
from qjax.models import ModelConfig


class Pair(NamedTuple):
    """names: of the matrices that share an input, in the order of `models.forward.Tap`. before: what gives it."""

    names: tuple[str, ...]
    before: str


PAIRS = (
    Pair(("attn_q", "attn_k", "attn_v"), "attn_norm"),
    Pair(("attn_output",), "attn_v"),
    Pair(("ffn_gate", "ffn_up"), "ffn_norm"),
    Pair(("ffn_down",), "ffn_up"),
)


def foldable(weights: Weights, pair: Pair) -> bool:
    """Whether what comes before can be divided: a packed matrix cannot."""
    return not isinstance(weights[pair.before], QuantizedArray)


def ties(pair: Pair, config: ModelConfig) -> Int32[np.ndarray, " in"] | None:
    """The row of what comes before that each column of the input is made by; None where that is its own number."""
    if pair.before != "attn_v" or config.heads == config.kv_heads:
        return None
    rows = np.arange(config.kv_heads * config.head_dim, dtype=np.int32).reshape(config.kv_heads, 1, config.head_dim)
    return np.repeat(rows, config.heads // config.kv_heads, axis=1).reshape(-1)


def fold(weights: Weights, pair: Pair, scale: Float32[Array, " in"], config: ModelConfig) -> Weights:
    """Weights that compute the same: the matrices' columns times a scale, what comes before (its bias too) over it.

    Float matrices come back as float32; a packed one is given its scale as an input's. A norm is divided in its own
    dtype, and the columns are multiplied by what that came to.

    Args:
      scale: of each column of the input, positive; equal where `ties` are.
    """
    made, before = dict(weights), jnp.asarray(weights[pair.before])
    if before.ndim == 1:
        divided = (before.astype(jnp.float32) / scale).astype(before.dtype)
        ratio = before.astype(jnp.float32) / divided.astype(jnp.float32)
        scale = jnp.where((divided != 0) & jnp.isfinite(ratio) & (ratio != 0), ratio, scale)
        made[pair.before] = divided
    else:
        rows = of_rows(scale, ties(pair, config))
        made[pair.before] = before.astype(jnp.float32) / rows[:, None]
        bias = f"{pair.before}_bias"
        if bias in weights:
            dtype = weights[bias].dtype
            made[bias] = (jnp.asarray(weights[bias]).astype(jnp.float32) / rows).astype(dtype)
    for name in pair.names:
        made[name] = _columns_times(weights[name], scale)
    return made


def of_rows(scale: Float32[Array, " in"], ties: Int32[np.ndarray, " in"] | None) -> Float32[Array, " rows"]:
    """The scale of each row of what comes before."""
    if ties is None:
        return scale
    first = np.unique(ties, return_index=True)[1]
    return scale[first]


def _columns_times(weight: Any, scale: Float32[Array, " in"]) -> Any:
    if isinstance(weight, TransformedArray):
        old = 1.0 if weight.input_scale is None else weight.input_scale
        return weight.replace(input_scale=old / scale)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(weight, QuantizedArray):
        return TransformedArray(weight, input_scale=1 / scale)
    return jnp.asarray(weight).astype(jnp.float32) * scale[None]
