"""ggml's plain types with importance: Q4_0, Q4_1, Q5_0 and Q5_1 by search, where without it extremes decide.

Source: quantize_row_q4_0_impl ... quantize_row_q5_1_impl of llama.cpp's ggml/src/ggml-quants.c.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.floats import f32_to_f16_bits
from qjax.quantizers import ggml_search as search

BLOCK = 32

Rows = Float32[Array, "rows n"]
# (head bytes, codes), as `ggml_legacy.Encoder.quantize` gives them.
Made = tuple[UInt8[Array, "rows blocks head"], UInt8[Array, "rows blocks 32"]]


def _columns(w: Rows) -> Float32[Array, "32 groups"]:
    return w.reshape(-1, BLOCK).T


def _weights(w: Rows, importance: Float32[Array, " n"]) -> Rows:
    """importance * sqrt(sigma2 + x^2), sigma2 being the row's mean of x^2."""
    sigma2 = jnp.sum(w * w, axis=-1, keepdims=True, dtype=jnp.float32) / np.float32(w.shape[-1])
    return importance.reshape(1, -1) * jnp.sqrt(sigma2 + w * w)


def _made(w: Rows, head: list[Float32[Array, " groups"]], codes: Float32[Array, "32 groups"]) -> Made:
    blocks = w.shape[-1] // BLOCK
    halves = lax.bitcast_convert_type(f32_to_f16_bits(jnp.stack(head, axis=-1)), jnp.uint8)
    return (
        halves.reshape(w.shape[0], blocks, 2 * len(head)),
        codes.T.reshape(w.shape[0], blocks, BLOCK).astype(jnp.int32).astype(jnp.uint8),
    )


def _symmetric(top: int) -> Callable[[Rows, Float32[Array, " n"]], Made]:
    def quantize(w: Rows, importance: Float32[Array, " n"]) -> Made:
        found = search.symmetric(_columns(w), _columns(_weights(w, importance)), top)
        return _made(w, [found.scale], found.codes)

    return quantize


def _affine(top: int) -> Callable[[Rows, Float32[Array, " n"]], Made]:
    def quantize(w: Rows, importance: Float32[Array, " n"]) -> Made:
        weights = _columns(_weights(w, importance))
        found = search.affine(_columns(w), weights, top, low_step=-0.9, step=0.05, steps=36)
        assert found.minimum is not None
        return _made(w, [found.scale, -found.minimum], found.codes)

    return quantize


WEIGHTED: Mapping[str, Callable[[Rows, Float32[Array, " n"]], Made]] = MappingProxyType(
    {"Q4_0": _symmetric(8), "Q4_1": _affine(15), "Q5_0": _symmetric(16), "Q5_1": _affine(31)}
)
