"""IQ1_S and IQ1_M: ternary points of 8 shifted by an eighth, 256 weights in 50 and 56 bytes.

w = d * (2 * scale + 1) * (point +- 1/8), with scales of 3 bits. Every product is exact in float32 (11 + 4 + 4
bits), so that no order or fusing of the multiplications can differ from `gguf.quants`, which shows the layouts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.floats import f16_to_f32
from qjax.arrays.lattices import points_of_8
from qjax.arrays.raw_bytes import flat_fields, half, u16


def _weights(d: jax.Array, scale: jax.Array, point: jax.Array, minus: jax.Array) -> jax.Array:
    """d: [..., 1]; scale: [..., s], one for 256/s weights; point: [..., 32, 8]; minus: bool[..., 32, 1]."""
    # point +- 1/8, counted in eighths: an integer.
    eighths = (8 * point + jnp.where(minus, np.int32(-1), np.int32(1))).astype(jnp.float32)
    factor = d * (2 * scale.astype(jnp.int32) + 1).astype(jnp.float32) * np.float32(0.125)
    groups = scale.shape[-1]
    grouped = eighths.reshape(*scale.shape, 256 // groups)
    return (factor[..., None] * grouped).reshape(*scale.shape[:-1], 256)


def decode_iq1_s(blocks: UInt8[Array, "*s 50"]) -> Float32[Array, "*s 256"]:
    """f16 d | 32 bytes: index, low 8 bits | 8 words: 4 x 3 high bits, scale, sign of the shift."""
    high = u16(blocks[..., 34:50])
    index = blocks[..., 2:34].astype(jnp.uint16) | (flat_fields(high, range(0, 12, 3), 7) << np.uint16(8))
    minus = jnp.repeat((high >> np.uint16(15)) != 0, 4, axis=-1)[..., None]
    scale = (high >> np.uint16(12)) & np.uint16(7)
    return _weights(half(blocks[..., 0:2]), scale, points_of_8("IQ1_S", index), minus)


def decode_iq1_m(blocks: UInt8[Array, "*s 56"]) -> Float32[Array, "*s 256"]:
    """32 bytes: index, low 8 bits | 16 bytes: 2 x (3 high bits, sign of the shift) | 4 words: 4 scales.

    The float16 d is dealt over the upper 4 bits of the four words, lowest first.
    """
    words = u16(blocks[..., 48:56])
    places = np.asarray([0, 4, 8, 12], np.uint16).reshape((1,) * (words.ndim - 1) + (4,))
    pieces = (words >> np.uint16(12)) << places
    # Disjoint bits: their sum is their union. (A union of four slices made XLA's CPU loop ten times slower.)
    d = f16_to_f32(jnp.sum(pieces, axis=-1, keepdims=True, dtype=jnp.uint16))
    high = flat_fields(blocks[..., 32:48], (0, 4), 15)
    index = blocks[..., 0:32].astype(jnp.uint16) | ((high & np.uint8(7)).astype(jnp.uint16) << np.uint16(8))
    minus = ((high >> np.uint8(3)) != 0)[..., None]
    return _weights(d, flat_fields(words, range(0, 12, 3), 7), points_of_8("IQ1_M", index), minus)
