"""IQ2_XXS, IQ2_XS and IQ2_S: points of 8 magnitudes with signs, 256 weights in 66, 74 and 82 bytes.

w = d * (scale + 1/2) / 4 * (+-point), with scales of 4 bits. Every product is exact in float32 (11 + 5 + 6
bits), so that no order or fusing of the multiplications can differ from `gguf.quants`, which shows the layouts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.lattices import apply_signs, points_of_8, with_parity
from qjax.arrays.raw_bytes import flat_fields, half, split_last, u16, u32


def _weights(d: jax.Array, scale: jax.Array, signed: jax.Array) -> jax.Array:
    """d: [..., 1]; scale: [..., s], one for 256/s weights; signed: int32[..., 32, 8]."""
    factor = d * (np.float32(0.5) + scale.astype(jnp.float32)) * np.float32(0.25)
    grouped = signed.astype(jnp.float32).reshape(*scale.shape, 256 // scale.shape[-1])
    return (factor[..., None] * grouped).reshape(*scale.shape[:-1], 256)


def decode_iq2_xxs(blocks: UInt8[Array, "*s 66"]) -> Float32[Array, "*s 256"]:
    """f16 d | 8 x (4 bytes: index; a word: 4 x 7 signs, 4 bits of scale)."""
    groups = split_last(blocks[..., 2:66], 8, 8)
    index = groups[..., 0:4].reshape(*blocks.shape[:-1], 32)
    words = u32(groups[..., 4:8])[..., 0]
    signs = with_parity(flat_fields(words, range(0, 28, 7), 127))
    signed = apply_signs(points_of_8("IQ2_XXS", index), signs)
    return _weights(half(blocks[..., 0:2]), words >> np.uint32(28), signed)


def decode_iq2_xs(blocks: UInt8[Array, "*s 74"]) -> Float32[Array, "*s 256"]:
    """f16 d | 32 words: index of 9 bits, 7 signs | 8 bytes: 2 scales each."""
    words = u16(blocks[..., 2:66])
    signs = with_parity((words >> np.uint16(9)).astype(jnp.uint32))
    signed = apply_signs(points_of_8("IQ2_XS", words & np.uint16(511)), signs)
    return _weights(half(blocks[..., 0:2]), flat_fields(blocks[..., 66:74], (0, 4), 15), signed)


def decode_iq2_s(blocks: UInt8[Array, "*s 82"]) -> Float32[Array, "*s 256"]:
    """f16 d | 32 bytes: index, low 8 bits | 32 bytes: 8 signs | 8 bytes: 4 x 2 high bits | 8 bytes: 2 scales."""
    high = flat_fields(blocks[..., 66:74], (0, 2, 4, 6), 3).astype(jnp.uint16)
    index = blocks[..., 2:34].astype(jnp.uint16) | (high << np.uint16(8))
    signed = apply_signs(points_of_8("IQ2_S", index), blocks[..., 34:66])
    return _weights(half(blocks[..., 0:2]), flat_fields(blocks[..., 74:82], (0, 4), 15), signed)
