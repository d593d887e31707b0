"""Blocks of ggml's searched types as columns: what a block is made of, and how its bytes are written.

Source: the block structs of llama.cpp's ggml/src/ggml-common.h.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8, UInt16

from qjax.arrays.floats import f16_to_f32, f32_to_f16_bits
from qjax.arrays.planes import Layout, Plane
from qjax.quantizers.ggml_search import ROWS_SUMMED_WELL, Found

SUPER_BLOCK = 256

# Blocks as columns, in any number of axes: [block size, ...]. What is wanted of a group lies side by side then.
Blocks = Float32[Array, "n *blocks"]
# One number a group: [groups of a block, ...].
Parts = Float32[Array, "parts *blocks"]


class Super(NamedTuple):
    """What a block is made of: float16 scale and minimum (as bits), integers of its groups, codes."""

    scale: UInt16[Array, "*blocks"]
    minimum: UInt16[Array, "*blocks"] | None
    sub_scale: Int32[Array, "parts *blocks"] | None
    sub_minimum: Int32[Array, "parts *blocks"] | None
    codes: UInt8[Array, "n *blocks"]


class Prepared(NamedTuple):
    """Groups and weights as a search takes them; rows past a group's size are there for speed alone, with weight 0."""

    x: Float32[Array, "rows parts *blocks"]
    weights: Float32[Array, "rows parts *blocks"]


class Steps(Protocol):
    """How a block is found, one step after the other.

    Best as programs of their own, since XLA:CPU makes what one loop reads anew for every number that it is read for.
    """

    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared: ...
    def search(self, groups: Prepared, weighted: bool) -> Found: ...
    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super: ...


def by_group(blocks: Blocks, size: int) -> Float32[Array, "size parts *blocks"]:
    """The groups of `size` of each block, number by number."""
    return jnp.swapaxes(blocks.reshape(blocks.shape[0] // size, size, *blocks.shape[1:]), 0, 1)


def by_block(groups: Float32[Array, "size parts *blocks"]) -> Blocks:
    """The inverse of `by_group`."""
    return jnp.swapaxes(groups, 0, 1).reshape(-1, *groups.shape[2:])


def padded(x: Float32[Array, "n parts *blocks"], weights: Float32[Array, "n parts *blocks"]) -> Prepared:
    """With as many rows as are summed well."""
    more = ROWS_SUMMED_WELL - x.shape[0]
    if more <= 0:
        return Prepared(x, weights)
    return Prepared(jnp.concatenate([x, x[:more]]), jnp.pad(weights, ((0, more), *((0, 0),) * (x.ndim - 1))))


def as_bytes(codes: Float32[Array, "n *blocks"]) -> UInt8[Array, "n *blocks"]:
    """Whole numbers, modulo 256."""
    return codes.astype(jnp.int32).astype(jnp.uint8)


def importance_weights(x: Blocks, importance: Blocks, factor: int) -> Blocks:
    """importance * sqrt(sigma2 + x^2), sigma2 being `factor` times the block's mean of x^2."""
    squares = jnp.sum(x * x, axis=0, dtype=jnp.float32)
    sigma2 = np.float32(factor) * squares / np.float32(x.shape[0])
    return importance * jnp.sqrt(sigma2[None] + x * x)


def half(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float16 bits of x, and the float32 that they stand for."""
    bits = f32_to_f16_bits(x)
    return bits, f16_to_f32(bits)


def _bytes16(bits: jax.Array) -> UInt8[Array, "2 *blocks"]:
    return jnp.moveaxis(lax.bitcast_convert_type(bits, jnp.uint8), -1, 0)


def _plane(bits: UInt8[Array, "n *blocks"], plane: Plane) -> UInt8[Array, "nbytes *blocks"]:
    """`planes.pack_plane` down the columns."""
    chunks = bits.reshape(bits.shape[0] // plane.chunk, plane.per_byte, plane.stride, *bits.shape[1:])
    parts = [chunks[:, i] << np.uint8(i * plane.width) for i in range(plane.per_byte)]
    return functools.reduce(jnp.bitwise_or, parts).reshape(-1, *bits.shape[1:])


# A block's integer scales and minimums, as bytes: [parts, ...] each to [nbytes, ...].
PackIntegers = Callable[[jax.Array, jax.Array | None], jax.Array]


class BlockForm(NamedTuple):
    """How a block of `size` weights is written in `nbytes` bytes.

    fields: in file order; "low" and "high" are planes of `layout`, "d" and "m" float16s, "sub" the groups' integers.
    """

    size: int
    nbytes: int
    fields: tuple[str, ...]
    layout: Layout
    sub: PackIntegers | None = None

    def pack(self, made: Super) -> UInt8[Array, "nbytes *blocks"]:
        """The bytes of each block."""
        parts, shift = {}, 0
        for name, plane in zip(("low", "high"), self.layout, strict=False):
            bits = (made.codes >> np.uint8(shift)) & np.uint8((1 << plane.width) - 1)
            parts[name] = _plane(bits, plane)
            shift += plane.width
        if self.sub is not None and made.sub_scale is not None:
            # Negative integers wrap to the bytes that stand for them.
            low = None if made.sub_minimum is None else made.sub_minimum.astype(jnp.uint8)
            parts["sub"] = self.sub(made.sub_scale.astype(jnp.uint8), low)
        parts["d"] = _bytes16(made.scale)
        if made.minimum is not None:
            parts["m"] = _bytes16(made.minimum)
        return jnp.concatenate([parts[field] for field in self.fields])

    def read(self, name: str, blocks: UInt8[Array, "nbytes *blocks"]) -> UInt8[Array, "some *blocks"]:
        """The bytes of a field."""
        sizes = {"d": 2, "m": 2}
        sizes |= {plane: self.size * bits.width // 8 for plane, bits in zip(("low", "high"), self.layout, strict=False)}
        sizes["sub"] = self.nbytes - sum(sizes[field] for field in self.fields if field != "sub")
        first = sum(sizes[field] for field in self.fields[: self.fields.index(name)])
        return blocks[first : first + sizes[name]]


def _two_nibbles(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """Q2_K: a scale in the low nibble, a minimum in the high one."""
    assert minimum is not None
    return scale | (minimum << np.uint8(4))


def _six_bits(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """Q3_K: the inverse of `two_level._six_bits`."""
    shifted = scale + np.uint8(32)
    low, high = shifted & np.uint8(15), shifted >> np.uint8(4)
    nibbles = low[:8] | (low[8:] << np.uint8(4))
    pairs = high[0:4] | (high[4:8] << np.uint8(2)) | (high[8:12] << np.uint8(4)) | (high[12:] << np.uint8(6))
    return jnp.concatenate([nibbles, pairs])


def _six_bits_with_minimum(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """Q4_K and Q5_K: the inverse of `two_level._six_bits_with_minimum`."""
    assert minimum is not None
    top_bits = np.uint8(0xC0)
    first = scale[:4] | ((scale[4:] << np.uint8(2)) & top_bits)
    second = minimum[:4] | ((minimum[4:] << np.uint8(2)) & top_bits)
    third = (scale[4:] & np.uint8(15)) | (minimum[4:] << np.uint8(4))
    return jnp.concatenate([first, second, third])


def _int8(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    return scale


def _six_bits_split(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """IQ4_XS: the inverse of `two_level._six_bits_split`."""
    shifted = scale + np.uint8(32)
    low, high = shifted & np.uint8(15), shifted >> np.uint8(4)
    pairs = high[0::4] | (high[1::4] << np.uint8(2)) | (high[2::4] << np.uint8(4)) | (high[3::4] << np.uint8(6))
    return jnp.concatenate([pairs, low[0::2] | (low[1::2] << np.uint8(4))])


FORMS: Mapping[str, BlockForm] = MappingProxyType(
    {
        "Q2_K": BlockForm(SUPER_BLOCK, 84, ("sub", "low", "d", "m"), (Plane(2, 32),), _two_nibbles),
        "Q3_K": BlockForm(SUPER_BLOCK, 110, ("high", "low", "sub", "d"), (Plane(2, 32), Plane(1, 32)), _six_bits),
        "Q4_K": BlockForm(SUPER_BLOCK, 144, ("d", "m", "sub", "low"), (Plane(4, 32),), _six_bits_with_minimum),
        "Q5_K": BlockForm(
            SUPER_BLOCK, 176, ("d", "m", "sub", "high", "low"), (Plane(4, 32), Plane(1, 32)), _six_bits_with_minimum
        ),
        "Q6_K": BlockForm(SUPER_BLOCK, 210, ("low", "high", "sub", "d"), (Plane(4, 64), Plane(2, 32)), _int8),
        "Q4_0": BlockForm(32, 18, ("d", "low"), (Plane(4, 16),)),
        "Q4_1": BlockForm(32, 20, ("d", "m", "low"), (Plane(4, 16),)),
        "Q5_0": BlockForm(32, 22, ("d", "high", "low"), (Plane(4, 16), Plane(1, 1))),
        "Q5_1": BlockForm(32, 24, ("d", "m", "high", "low"), (Plane(4, 16), Plane(1, 1))),
        "Q8_0": BlockForm(32, 34, ("d", "low"), (Plane(8, 1),)),
        "IQ4_NL": BlockForm(32, 18, ("d", "low"), (Plane(4, 16),)),
        "IQ4_XS": BlockForm(SUPER_BLOCK, 136, ("d", "sub", "low"), (Plane(4, 16),), _six_bits_split),
    }
)
