"""Encoders of ggml's K-quants, with and without importance: floats to super-blocks of 256.

Source: quantize_row_q2_K_ref ... q6_K_ref (no importance) and quantize_row_q2_K_impl ... (with it) of llama.cpp's
ggml/src/ggml-quants.c; the searches are in `ggml_search`. First each group finds its scale (and minimum), then the
super-block rounds those to integers under one float16 scale, and last all codes are made anew for what these became.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.floats import f16_to_f32, f32_to_f16_bits
from qjax.arrays.planes import Layout, Plane, pack
from qjax.quantizers import ggml_search as search
from qjax.quantizers.ggml_search import Found, total

SUPER_BLOCK = 256

Blocks = Float32[Array, "blocks 256"]
# One number a group: [groups of a super-block, super-blocks].
Parts = Float32[Array, "parts blocks"]


class Super(NamedTuple):
    """What a super-block is made of: float16 scale and minimum (as bits), integers of its groups, codes."""

    scale: jax.Array
    minimum: jax.Array | None
    sub_scale: jax.Array  # int32 [parts, blocks]
    sub_minimum: jax.Array | None
    codes: jax.Array  # uint8 [blocks, 256]


def _groups(blocks: Blocks, size: int) -> Float32[Array, "size groups"]:
    return blocks.reshape(-1, size).T


def _parts(values: Float32[Array, " groups"], size: int) -> Parts:
    return values.reshape(-1, SUPER_BLOCK // size).T


def _importance_weights(x: Blocks, importance: Blocks, factor: int) -> Blocks:
    """importance * sqrt(sigma2 + x^2), sigma2 being `factor` times the super-block's mean of x^2."""
    sigma2 = np.float32(factor) * jnp.sum(x * x, axis=-1, keepdims=True, dtype=jnp.float32) / np.float32(SUPER_BLOCK)
    return importance * jnp.sqrt(sigma2 + x * x)


def _half(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float16 bits of x, and the float32 that they stand for."""
    bits = f32_to_f16_bits(x)
    return bits, f16_to_f32(bits)


def _spread(parts: Parts, size: int) -> Blocks:
    return jnp.repeat(parts.T, size, axis=1)


def _codes(
    x: Blocks, scale: Parts, minimum: Parts | None, found: Found, size: int, low: int, top: int
) -> UInt8[Array, "blocks 256"]:
    """Codes for the scales that a super-block has in the end; where a scale became 0, those that the search had."""
    d = _spread(scale, size)
    none = d == 0
    shifted = x if minimum is None else x + _spread(minimum, size)
    code = jnp.clip(jnp.round(shifted / jnp.where(none, np.float32(1), d)), np.float32(low), np.float32(top))
    code = jnp.where(none, found.codes.T.reshape(x.shape), code - np.float32(low))
    return code.astype(jnp.int32).astype(jnp.uint8)


class _Affine(NamedTuple):
    """What Q2_K, Q4_K and Q5_K differ in."""

    size: int  # of a group
    top: int  # code
    integer: int  # the highest of the groups' integers
    steps: tuple[float, float, int]  # without importance
    absolute: bool
    factor: int  # of sigma2
    mean_weight: bool  # weights without importance: the group's root mean square is added to |x|


_Q2, _Q4, _Q5 = (
    _Affine(16, 3, 15, (-0.5, 0.1, 15), True, 1, False),
    _Affine(32, 15, 63, (-1.0, 0.1, 20), False, 2, True),
    _Affine(32, 31, 63, (-0.5, 0.1, 15), False, 2, True),
)


def _affine(kind: _Affine, blocks: Blocks, importance: Blocks | None) -> Super:
    x = _groups(blocks, kind.size)
    if importance is None:
        weights = jnp.abs(x)
        if kind.mean_weight:
            weights = jnp.sqrt(total(x * x) / np.float32(kind.size)) + weights
        low, step, steps = kind.steps
        found = search.affine(x, weights, kind.top, low_step=low, step=step, steps=steps, absolute=kind.absolute)
        scales, minimums = _parts(found.scale, kind.size), _parts(_there(found.minimum), kind.size)
        (scale, integers), (minimum, low_integers) = (_by_largest(p, kind.integer) for p in (scales, minimums))
    else:
        weights = _groups(_importance_weights(blocks, importance, kind.factor), kind.size)
        found = search.affine(x, weights, kind.top, low_step=-0.9, step=0.05, steps=36)
        scales, minimums = _parts(found.scale, kind.size), _parts(_there(found.minimum), kind.size)
        sums = _parts(total(weights), kind.size)
        (scale, integers), (minimum, low_integers) = (
            (one.scale, one.codes) for one in (search.positive(p, sums, kind.integer) for p in (scales, minimums))
        )
    scale_bits, d = _half(scale)
    minimum_bits, m = _half(minimum)
    codes = _codes(blocks, d * integers, m * low_integers, found, kind.size, 0, kind.top)
    return Super(scale_bits, minimum_bits, integers.astype(jnp.int32), low_integers.astype(jnp.int32), codes)


def _there(x: jax.Array | None) -> jax.Array:
    assert x is not None
    return x


def _by_largest(parts: Parts, top: int) -> tuple[jax.Array, Parts]:
    """(scale, integers): the largest of a super-block becomes `top`."""
    most = jnp.maximum(jnp.max(parts, axis=0), np.float32(0))
    none = most == 0
    inverse = jnp.where(none, np.float32(0), np.float32(top) / jnp.where(none, np.float32(1), most))
    return most / np.float32(top), jnp.minimum(jnp.round(inverse * parts), np.float32(top))


def _q3(blocks: Blocks, importance: Blocks | None) -> Super:
    x = _groups(blocks, 16)
    if importance is None:
        found = search.three_bits(x)
        _, most = search.largest(_parts(found.scale, 16))
        none = most == 0
        inverse = np.float32(-32) / jnp.where(none, np.float32(1), most)
        integers = jnp.clip(jnp.round(inverse * _parts(found.scale, 16)), np.float32(-32), np.float32(31))
        # All bytes are zero then, which stand for -32.
        integers = jnp.where(none, np.float32(-32), integers)
        scale = jnp.where(none, np.float32(0), np.float32(1) / inverse)
    else:
        weights = _groups(_importance_weights(blocks, importance, 2), 16)
        found = search.symmetric(x, weights, 4)
        one = search.symmetric(_parts(found.scale, 16), _parts(total(weights), 16), 32)
        scale, integers = one.scale, one.codes - np.float32(32)
    scale_bits, d = _half(scale)
    codes = _codes(blocks, d * integers, None, found, 16, -4, 3)
    return Super(scale_bits, None, integers.astype(jnp.int32) + np.int32(32), None, codes)


def _q6(blocks: Blocks, importance: Blocks | None) -> Super:
    x = _groups(blocks, 16)
    found = search.symmetric(x, x * x if importance is None else _groups(importance, 16), 32)
    scales = _parts(found.scale, 16)
    size, most = search.largest(scales)
    none = size < search.TINY
    inverse = np.float32(-128) / jnp.where(none, np.float32(1), most)
    integers = jnp.where(none, np.float32(0), jnp.minimum(jnp.round(inverse * scales), np.float32(127)))
    scale_bits, d = _half(jnp.where(none, np.float32(0), np.float32(1) / inverse))
    codes = _codes(blocks, d * integers, None, found, 16, -32, 31)
    return Super(scale_bits, None, integers.astype(jnp.int32), None, jnp.where(none[:, None], np.uint8(0), codes))


def _bytes16(bits: jax.Array) -> UInt8[Array, "blocks 2"]:
    return lax.bitcast_convert_type(bits, jnp.uint8)


def _two_nibbles(made: Super) -> jax.Array:
    """Q2_K: a scale in the low nibble, a minimum in the high one."""
    low, high = made.sub_scale.astype(jnp.uint8), _there(made.sub_minimum).astype(jnp.uint8)
    return (low | (high << np.uint8(4))).T


def _six_bits(made: Super) -> jax.Array:
    """Q3_K: the inverse of `two_level._six_bits`."""
    code = made.sub_scale.astype(jnp.uint8)
    low, high = code & np.uint8(15), code >> np.uint8(4)
    nibbles = low[:8] | (low[8:] << np.uint8(4))
    pairs = high[0:4] | (high[4:8] << np.uint8(2)) | (high[8:12] << np.uint8(4)) | (high[12:] << np.uint8(6))
    return jnp.concatenate([nibbles, pairs]).T


def _six_bits_with_minimum(made: Super) -> jax.Array:
    """Q4_K and Q5_K: the inverse of `two_level._six_bits_with_minimum`."""
    scale, minimum = made.sub_scale.astype(jnp.uint8), _there(made.sub_minimum).astype(jnp.uint8)
    top_bits = np.uint8(0xC0)
    first = scale[:4] | ((scale[4:] << np.uint8(2)) & top_bits)
    second = minimum[:4] | ((minimum[4:] << np.uint8(2)) & top_bits)
    third = (scale[4:] & np.uint8(15)) | (minimum[4:] << np.uint8(4))
    return jnp.concatenate([first, second, third]).T


def _int8(made: Super) -> jax.Array:
    return lax.bitcast_convert_type(made.sub_scale.astype(jnp.int8), jnp.uint8).T


class KType(NamedTuple):
    """A K-quant: its bytes, how a super-block is found, and how it is written.

    fields: in file order; "low" and "high" are planes of `layout`, "d" and "m" float16s, "sub" the groups' integers.
    """

    nbytes: int
    quantize: Callable[[Blocks, Blocks | None], Super]
    fields: tuple[str, ...]
    layout: Layout
    sub: Callable[[Super], jax.Array]

    def pack(self, made: Super) -> UInt8[Array, "blocks nbytes"]:
        planes = dict(zip(("low", "high"), pack(made.codes, self.layout), strict=False))
        parts = {
            **planes,
            "d": _bytes16(made.scale),
            "m": None if made.minimum is None else _bytes16(made.minimum),
            "sub": self.sub(made),
        }
        return jnp.concatenate([parts[field] for field in self.fields], axis=-1)


K_TYPES: MappingProxyType[str, KType] = MappingProxyType(
    {
        "Q2_K": KType(
            84,
            lambda x, importance: _affine(_Q2, x, importance),
            ("sub", "low", "d", "m"),
            (Plane(2, 32),),
            _two_nibbles,
        ),
        "Q3_K": KType(110, _q3, ("high", "low", "sub", "d"), (Plane(2, 32), Plane(1, 32)), _six_bits),
        "Q4_K": KType(
            144,
            lambda x, importance: _affine(_Q4, x, importance),
            ("d", "m", "sub", "low"),
            (Plane(4, 32),),
            _six_bits_with_minimum,
        ),
        "Q5_K": KType(
            176,
            lambda x, importance: _affine(_Q5, x, importance),
            ("d", "m", "sub", "high", "low"),
            (Plane(4, 32), Plane(1, 32)),
            _six_bits_with_minimum,
        ),
        "Q6_K": KType(210, _q6, ("low", "high", "sub", "d"), (Plane(4, 64), Plane(2, 32)), _int8),
    }
)
