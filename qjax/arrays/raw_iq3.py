"""IQ3_XXS and IQ3_S: points of 4 magnitudes with signs, 256 weights in 98 and 110 bytes.

w = d * (scale + 1/2) / 2 * (+-point), or d * (1 + 2 * scale) * (+-point) for IQ3_S, with scales of 4 bits.
Every product is exact in float32 (11 + 5 + 6 bits), so that no order or fusing of the multiplications can differ
from `gguf.quants`, which shows the layouts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.lattices import apply_signs, points_of_4, with_parity
from qjax.arrays.raw_bytes import flat_fields, half, u32


def _weights(factor: jax.Array, signed: jax.Array) -> jax.Array:
    """factor: [..., 8], one for 32 weights; signed: int32[..., 32, 8]."""
    grouped = signed.astype(jnp.float32).reshape(*factor.shape, 32)
    return (factor[..., None] * grouped).reshape(*factor.shape[:-1], 256)


def decode_iq3_xxs(blocks: UInt8[Array, "*s 98"]) -> Float32[Array, "*s 256"]:
    """f16 d | 64 bytes: index | 8 words: 4 x 7 signs, 4 bits of scale."""
    words = u32(blocks[..., 66:98])
    signs = with_parity(flat_fields(words, range(0, 28, 7), 127))
    signed = apply_signs(points_of_4("IQ3_XXS", blocks[..., 2:66]), signs)
    scale = (words >> np.uint32(28)).astype(jnp.float32)
    return _weights(half(blocks[..., 0:2]) * (np.float32(0.5) + scale) * np.float32(0.5), signed)


def decode_iq3_s(blocks: UInt8[Array, "*s 110"]) -> Float32[Array, "*s 256"]:
    """f16 d | 64 bytes: index, low 8 bits | 8 bytes: 8 high bits | 32 bytes: 8 signs | 4 bytes: 2 scales."""
    high = flat_fields(blocks[..., 66:74], range(8), 1).astype(jnp.uint16)
    index = blocks[..., 2:66].astype(jnp.uint16) | (high << np.uint16(8))
    signed = apply_signs(points_of_4("IQ3_S", index), blocks[..., 74:106])
    scale = flat_fields(blocks[..., 106:110], (0, 4), 15)
    return _weights(half(blocks[..., 0:2]) * (np.uint8(1) + np.uint8(2) * scale).astype(jnp.float32), signed)
