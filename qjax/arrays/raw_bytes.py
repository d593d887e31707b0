"""Reading fields out of blocks of bytes: half scales, little-endian words, bit fields.

Every reader keeps the leading axes and adds or widens only the last, so that a sharding of the rows or of the
blocks survives it, and the rank stays low (XLA on CPUs is unsound at ranks above 6).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt8, UInt16, UInt32

from qjax.arrays.floats import f16_to_f32

Bytes = UInt8[Array, "*s bytes"]


def split_last(x: jax.Array, *sizes: int) -> jax.Array:
    """The last axis reshaped to `sizes`."""
    return x.reshape(*x.shape[:-1], *sizes)


def u16(x: Bytes) -> UInt16[Array, "*s words"]:
    """Pairs of bytes as little-endian words."""
    return lax.bitcast_convert_type(split_last(x, x.shape[-1] // 2, 2), jnp.uint16)


def u32(x: Bytes) -> UInt32[Array, "*s words"]:
    """Fours of bytes as little-endian words."""
    return lax.bitcast_convert_type(split_last(x, x.shape[-1] // 4, 4), jnp.uint32)


def half(x: Bytes) -> Float32[Array, "*s halves"]:
    """Pairs of bytes as float16, made float32 exactly."""
    return f16_to_f32(u16(x))


def fields(x: jax.Array, shifts: Sequence[int], mask: int) -> jax.Array:
    """`(x >> shift) & mask` for each shift, along a new last axis."""
    places = np.asarray(shifts, dtype=x.dtype).reshape((1,) * x.ndim + (len(shifts),))
    return (jnp.expand_dims(x, -1) >> places) & x.dtype.type(mask)


def flat_fields(x: jax.Array, shifts: Sequence[int], mask: int) -> jax.Array:
    """As `fields`, the fields of one word beside each other on the last axis."""
    return split_last(fields(x, shifts, mask), -1).reshape(*x.shape[:-1], -1)


def strided_fields(x: Bytes, stride: int, shifts: Sequence[int], mask: int) -> UInt8[Array, "*s fields"]:
    """ggml's order of small codes: one field of `stride` bytes after another, then the next bytes.

    `x`: [..., n * stride] bytes; the result: [..., n * len(shifts) * stride] codes.
    """
    places = np.asarray(shifts, dtype=x.dtype).reshape((1,) * x.ndim + (len(shifts), 1))
    groups = jnp.expand_dims(split_last(x, x.shape[-1] // stride, stride), -2)
    return ((groups >> places) & x.dtype.type(mask)).reshape(*x.shape[:-1], -1)
