"""Encoders of ggml's K-quants, with and without importance: floats to super-blocks of 256.

Source: quantize_row_q2_K_ref ... q6_K_ref (no importance) and quantize_row_q2_K_impl ... (with it) of llama.cpp's
ggml/src/ggml-quants.c; the searches are in `ggml_search`. First each group finds its scale (and minimum), then the
super-block rounds those to integers under one float16 scale, and last all codes are made anew for what these became.
"""

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8, UInt16

from qjax.arrays.floats import f16_to_f32, f32_to_f16_bits
from qjax.arrays.planes import Layout, Plane
from qjax.quantizers import ggml_search as search
from qjax.quantizers.ggml_search import Found, total

SUPER_BLOCK = 256

# Super-blocks as columns, in any number of axes: [256, ...]. What is wanted of a group lies side by side then.
Blocks = Float32[Array, "256 *blocks"]
# One number a group: [groups of a super-block, ...].
Parts = Float32[Array, "parts *blocks"]


class Super(NamedTuple):
    """What a super-block is made of: float16 scale and minimum (as bits), integers of its groups, codes."""

    scale: UInt16[Array, "*blocks"]
    minimum: UInt16[Array, "*blocks"] | None
    sub_scale: Int32[Array, "parts *blocks"]
    sub_minimum: Int32[Array, "parts *blocks"] | None
    codes: UInt8[Array, "256 *blocks"]


class Prepared(NamedTuple):
    """Groups and weights as a search takes them; rows past a group's size are there for speed alone, with weight 0."""

    x: Float32[Array, "rows parts *blocks"]
    weights: Float32[Array, "rows parts *blocks"]


def _groups(blocks: Blocks, size: int) -> Float32[Array, "size parts *blocks"]:
    return jnp.swapaxes(blocks.reshape(SUPER_BLOCK // size, size, *blocks.shape[1:]), 0, 1)


def _importance_weights(x: Blocks, importance: Blocks, factor: int) -> Blocks:
    """importance * sqrt(sigma2 + x^2), sigma2 being `factor` times the super-block's mean of x^2."""
    squares = jnp.sum(x * x, axis=0, dtype=jnp.float32)
    sigma2 = np.float32(factor) * squares / np.float32(SUPER_BLOCK)
    return importance * jnp.sqrt(sigma2[None] + x * x)


def _half(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float16 bits of x, and the float32 that they stand for."""
    bits = f32_to_f16_bits(x)
    return bits, f16_to_f32(bits)


def _codes(
    x: Float32[Array, "size parts *blocks"], scale: Parts, minimum: Parts | None, found: Found, low: int, top: int
) -> UInt8[Array, "256 *blocks"]:
    """Codes for the scales that a super-block has in the end; where a scale became 0, those that the search had."""
    none = (scale == 0)[None]
    shifted = x if minimum is None else x + minimum[None]
    code = jnp.round(shifted / jnp.where(none, np.float32(1), scale[None]))
    code = jnp.clip(code, np.float32(low), np.float32(top)) - np.float32(low)
    code = jnp.where(none, found.codes[: x.shape[0]], code)
    return jnp.swapaxes(code, 0, 1).reshape(SUPER_BLOCK, *x.shape[2:]).astype(jnp.int32).astype(jnp.uint8)


def _by_largest(parts: Parts, top: int) -> tuple[jax.Array, Parts]:
    """(scale, integers): the largest of a super-block becomes `top`."""
    most = jnp.maximum(jnp.max(parts, axis=0), np.float32(0))
    none = most == 0
    inverse = jnp.where(none, np.float32(0), np.float32(top) / jnp.where(none, np.float32(1), most))
    return most / np.float32(top), jnp.minimum(jnp.round(inverse[None] * parts), np.float32(top))


class Affine(NamedTuple):
    """Q2_K, Q4_K and Q5_K: scale and minimum a group.

    integer: the highest of the groups' integers. steps: of the search without importance. factor: of sigma2.
    mean_weight: weights without importance are |x| and the group's root mean square, not |x| alone.
    """

    size: int
    top: int
    integer: int
    steps: tuple[float, float, int]
    absolute: bool
    factor: int
    mean_weight: bool

    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        x = _groups(blocks, self.size)
        if importance is not None:
            weights = _groups(_importance_weights(blocks, importance, self.factor), self.size)
        elif self.mean_weight:
            weights = jnp.sqrt(total(x * x) / np.float32(self.size))[None] + jnp.abs(x)
        else:
            weights = jnp.abs(x)
        more = search.ROWS_SUMMED_WELL - self.size
        if more:
            x, weights = jnp.concatenate([x, x[:more]]), jnp.pad(weights, ((0, more), *((0, 0),) * (x.ndim - 1)))
        return Prepared(x, weights)

    def search(self, groups: Prepared, weighted: bool) -> Found:
        if weighted:
            return search.affine(*groups, self.top, low_step=-0.9, step=0.05, steps=36)
        low, step, steps = self.steps
        return search.affine(*groups, self.top, low_step=low, step=step, steps=steps, absolute=self.absolute)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        assert found.minimum is not None
        if weighted:
            sums = total(groups.weights)
            scale, integers, _ = search.positive(found.scale, sums, self.integer)
            minimum, low_integers, _ = search.positive(found.minimum, sums, self.integer)
        else:
            scale, integers = _by_largest(found.scale, self.integer)
            minimum, low_integers = _by_largest(found.minimum, self.integer)
        (scale_bits, d), (minimum_bits, m) = _half(scale), _half(minimum)
        codes = _codes(groups.x[: self.size], d[None] * integers, m[None] * low_integers, found, 0, self.top)
        return Super(scale_bits, minimum_bits, integers.astype(jnp.int32), low_integers.astype(jnp.int32), codes)


class _Symmetric(NamedTuple):
    """Q3_K and Q6_K: groups of 16 with a scale; codes low ... top."""

    low: int
    top: int

    def _x(self, blocks: Blocks) -> Float32[Array, "16 parts *blocks"]:
        return _groups(blocks, 16)


class Q3(_Symmetric):
    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        x = self._x(blocks)
        return Prepared(x, x * x if importance is None else _groups(_importance_weights(blocks, importance, 2), 16))

    def search(self, groups: Prepared, weighted: bool) -> Found:
        return search.symmetric(*groups, self.top + 1) if weighted else search.three_bits(groups.x, self.top + 1)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        if weighted:
            scale, codes, _ = search.symmetric(found.scale, total(groups.weights), 32)
            integers = codes - np.float32(32)
        else:
            _, most = search.largest(found.scale)
            none = most == 0
            inverse = np.float32(-32) / jnp.where(none, np.float32(1), most)
            integers = jnp.clip(jnp.round(inverse[None] * found.scale), np.float32(-32), np.float32(31))
            # All bytes are zero then, which stand for -32.
            integers = jnp.where(none[None], np.float32(-32), integers)
            scale = jnp.where(none, np.float32(0), np.float32(1) / inverse)
        scale_bits, d = _half(scale)
        codes = _codes(groups.x, d[None] * integers, None, found, self.low, self.top)
        return Super(scale_bits, None, integers.astype(jnp.int32) + np.int32(32), None, codes)


class Q6(_Symmetric):
    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        x = self._x(blocks)
        return Prepared(x, x * x if importance is None else self._x(jnp.broadcast_to(importance, blocks.shape)))

    def search(self, groups: Prepared, weighted: bool) -> Found:
        return search.symmetric(*groups, self.top + 1)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        size, most = search.largest(found.scale)
        none = size < search.TINY
        inverse = np.float32(-128) / jnp.where(none, np.float32(1), most)
        integers = jnp.minimum(jnp.round(inverse[None] * found.scale), np.float32(127))
        integers = jnp.where(none[None], np.float32(0), integers)
        scale_bits, d = _half(jnp.where(none, np.float32(0), np.float32(1) / inverse))
        codes = _codes(groups.x, d[None] * integers, None, found, self.low, self.top)
        return Super(scale_bits, None, integers.astype(jnp.int32), None, jnp.where(none[None], np.uint8(0), codes))


def _bytes16(bits: jax.Array) -> UInt8[Array, "2 *blocks"]:
    return jnp.moveaxis(lax.bitcast_convert_type(bits, jnp.uint8), -1, 0)


def _plane(bits: UInt8[Array, "256 *blocks"], plane: Plane) -> UInt8[Array, "nbytes *blocks"]:
    """`planes.pack_plane` down the columns."""
    chunks = bits.reshape(SUPER_BLOCK // plane.chunk, plane.per_byte, plane.stride, *bits.shape[1:])
    parts = [chunks[:, i] << np.uint8(i * plane.width) for i in range(plane.per_byte)]
    return functools.reduce(jnp.bitwise_or, parts).reshape(-1, *bits.shape[1:])


def _two_nibbles(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """Q2_K: a scale in the low nibble, a minimum in the high one."""
    assert minimum is not None
    return scale | (minimum << np.uint8(4))


def _six_bits(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """Q3_K: the inverse of `two_level._six_bits`."""
    low, high = scale & np.uint8(15), scale >> np.uint8(4)
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


class KType(NamedTuple):
    """A K-quant: its bytes, how a super-block is found, and how it is written.

    steps: prepare, search, finish, one after the other; best as programs of their own, since XLA:CPU makes what one
      loop reads anew for every number that it is read for.
    fields: in file order; "low" and "high" are planes of `layout`, "d" and "m" float16s, "sub" the groups' integers.
    """

    nbytes: int
    steps: Affine | Q3 | Q6
    fields: tuple[str, ...]
    layout: Layout
    sub: Callable[[jax.Array, jax.Array | None], jax.Array]

    def pack(self, made: Super) -> UInt8[Array, "nbytes *blocks"]:
        parts, shift = {}, 0
        for name, plane in zip(("low", "high"), self.layout, strict=False):
            bits = (made.codes >> np.uint8(shift)) & np.uint8((1 << plane.width) - 1)
            parts[name] = _plane(bits, plane)
            shift += plane.width
        # Negative integers wrap to the bytes that stand for them.
        low = None if made.sub_minimum is None else made.sub_minimum.astype(jnp.uint8)
        parts["sub"] = self.sub(made.sub_scale.astype(jnp.uint8), low)
        parts["d"] = _bytes16(made.scale)
        if made.minimum is not None:
            parts["m"] = _bytes16(made.minimum)
        return jnp.concatenate([parts[field] for field in self.fields])


K_TYPES: MappingProxyType[str, KType] = MappingProxyType(
    {
        "Q2_K": KType(
            84,
            Affine(16, 3, 15, (-0.5, 0.1, 15), absolute=True, factor=1, mean_weight=False),
            ("sub", "low", "d", "m"),
            (Plane(2, 32),),
            _two_nibbles,
        ),
        "Q3_K": KType(110, Q3(-4, 3), ("high", "low", "sub", "d"), (Plane(2, 32), Plane(1, 32)), _six_bits),
        "Q4_K": KType(
            144,
            Affine(32, 15, 63, (-1.0, 0.1, 20), absolute=False, factor=2, mean_weight=True),
            ("d", "m", "sub", "low"),
            (Plane(4, 32),),
            _six_bits_with_minimum,
        ),
        "Q5_K": KType(
            176,
            Affine(32, 31, 63, (-0.5, 0.1, 15), absolute=False, factor=2, mean_weight=True),
            ("d", "m", "sub", "high", "low"),
            (Plane(4, 32), Plane(1, 32)),
            _six_bits_with_minimum,
        ),
        "Q6_K": KType(210, Q6(-32, 31), ("low", "high", "sub", "d"), (Plane(4, 64), Plane(2, 32)), _int8),
    }
)
