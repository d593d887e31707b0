"""Types of one, two or three bits and NVFP4 that need no lattice: Q1_0, TQ1_0, TQ2_0, NVFP4.

Each weight is a small integer times one scale, a product that float32 holds exactly. Layouts: `gguf.quants`,
and for Q1_0, which that package names but cannot decode, ggml's `dequantize_row_q1_0`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.floats import ue4m3_to_f32
from qjax.arrays.raw_bytes import flat_fields, half, split_last, strided_fields

# Magnitudes of E2M1, doubled (0, 1, 2, 3, 4, 6, 8, 12), as the nibbles of a word: a look-up without a gather.
_E2M1 = np.uint32(0xC8643210)


def decode_q1_0(blocks: UInt8[Array, "*s 18"]) -> Float32[Array, "*s 128"]:
    """f16 d | 128 bits, lowest first: +d where set, else -d."""
    d = half(blocks[..., 0:2])
    return jnp.where(flat_fields(blocks[..., 2:18], range(8), 1) != 0, d, -d)


def _trits(x: UInt8[Array, "*s bytes"], stride: int, count: int) -> UInt8[Array, "*s trits"]:
    """`count` ternary digits of each byte, the most significant first, in ggml's strided order.

    A byte is a base-3 fraction of 256: the digit is what multiplying by 3 carries out of it, and the product
    modulo 256 is the fraction that remains.
    """
    powers = np.asarray([1, 3, 9, 27, 81][:count], np.uint8).reshape((1,) * x.ndim + (count, 1))
    groups = jnp.expand_dims(split_last(x, x.shape[-1] // stride, stride), -2)
    fraction = (groups * powers).astype(jnp.uint16)
    return ((fraction * np.uint16(3)) >> np.uint16(8)).astype(jnp.uint8).reshape(*x.shape[:-1], -1)


def decode_tq1_0(blocks: UInt8[Array, "*s 54"]) -> Float32[Array, "*s 256"]:
    """32 and 16 bytes of 5 ternary digits, 4 bytes of 4 | f16 d; w = d * (digit - 1)."""
    digits = jnp.concatenate(
        [
            _trits(blocks[..., 0:32], 32, 5),
            _trits(blocks[..., 32:48], 16, 5),
            _trits(blocks[..., 48:52], 4, 4),
        ],
        axis=-1,
    )
    return half(blocks[..., 52:54]) * (digits.astype(jnp.int32) - 1).astype(jnp.float32)


def decode_tq2_0(blocks: UInt8[Array, "*s 66"]) -> Float32[Array, "*s 256"]:
    """64 bytes of 4 two-bit codes | f16 d; w = d * (code - 1)."""
    codes = strided_fields(blocks[..., 0:64], 32, (0, 2, 4, 6), 3)
    return half(blocks[..., 64:66]) * (codes.astype(jnp.int32) - 1).astype(jnp.float32)


def decode_nvfp4(blocks: UInt8[Array, "*s 36"]) -> Float32[Array, "*s 64"]:
    """4 scales in unsigned E4M3 | 4 x 8 bytes of E2M1 codes, low nibbles first; a scale for 16 weights."""
    codes = split_last(strided_fields(blocks[..., 4:36], 8, (0, 4), 15), 4, 16).astype(jnp.uint32)
    magnitude = ((_E2M1 >> ((codes & np.uint32(7)) << np.uint32(2))) & np.uint32(15)).astype(jnp.int32)
    value = jnp.where(codes >= np.uint32(8), -magnitude, magnitude).astype(jnp.float32)
    return (ue4m3_to_f32(blocks[..., 0:4])[..., None] * value).reshape(*blocks.shape[:-1], 64)
