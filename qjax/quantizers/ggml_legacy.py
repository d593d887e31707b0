"""Encoders of ggml's plain types: floats to blocks, bit for bit as `gguf.quants.quantize` makes them.

One scale (and, for Q4_1 and Q5_1, a minimum) a block, found from the block's extremes and never searched for:
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, MXFP4, and the plain floats F16 and BF16.

Equality to the last bit takes three things that XLA does not give by itself:

- Subnormals. XLA flushes them on CPUs. So a block is first scaled by the power of two that brings its largest
  magnitude into [1, 2), by integer operations and without loss; quotients that leave this range are rounded by
  integers too (`qjax.arrays.floats`). What then still is subnormal is too small beside 1 to change a code.
- Fused multiply-adds, which round once where numpy rounds twice: a clamp that never bites stands between the
  multiplication and the addition.
- Division by a constant, which XLA replaces by a multiplication: divided by integers instead.

Where numpy casts to an integer what does not fit, which C leaves open, the codes are those that it gets on x86: 0
where the inverse of a scale overflows (a block of numbers below about 4e-37, whose float16 scale is zero anyway),
and an MXFP4 exponent below zero taken modulo 256. One thing is numpy's alone: the sign of a minimum that is zero,
in a block with zeros of both signs and no negative number, follows its SIMD order; here it is the last zero's, as
numpy mostly has it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from qjax.arrays.floats import (
    bits_of,
    divide_by_integer,
    f32_to_bf16_bits,
    f32_to_f16_bits,
    from_bits,
    reciprocal,
    scale_by_power_of_two,
)
from qjax.errors import QjaxError

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)

# (head bytes uint8[..., head], codes uint8[..., block_size]); plain floats have a head only.
Quantized = tuple[jax.Array, ...]


def _magnitude(x: jax.Array) -> jax.Array:
    """|x| as uint32 bits, whose order is the order of the numbers."""
    return bits_of(x) & _MAGNITUDE


def _exponent(x: jax.Array) -> jax.Array:
    """int32 e with |x| in [2^e, 2^(e + 1)), subnormals included; any number for zero."""
    magnitude = _magnitude(x)
    field = (magnitude >> np.uint32(23)).astype(jnp.int32)
    leading = lax.clz(magnitude).astype(jnp.int32)  # a subnormal m * 2^-149 has its highest bit at 31 - leading
    return jnp.where(field == 0, np.int32(31 - 149) - leading, field - np.int32(127))


def _absmax(blocks: jax.Array) -> jax.Array:
    """Largest magnitude of each block, float32[..., 1]."""
    return from_bits(jnp.max(_magnitude(blocks), axis=-1, keepdims=True))


def _inverse(d: jax.Array) -> jax.Array:
    """1 / d, and 0 where d is zero."""
    return jnp.where(_magnitude(d) == np.uint32(0), np.float32(0), reciprocal(d))


def _codes(unit: jax.Array, inverse: jax.Array, exponent: jax.Array, to_integer: Callable) -> jax.Array:
    """int32 codes of `unit * 2^exponent * inverse`, and 0 where the inverse is infinite."""
    product = unit * scale_by_power_of_two(inverse, exponent)
    guarded = jnp.clip(product, np.float32(-1024), np.float32(1024))  # no fused multiply-add past this point
    return jnp.where(_magnitude(inverse) == np.uint32(0x7F800000), np.int32(0), to_integer(guarded))


def _round_half_away(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    floor = jnp.floor(size)
    rounded = (floor + (size - floor >= np.float32(0.5)).astype(jnp.float32)).astype(jnp.int32)
    return jnp.where(x < 0, -rounded, rounded)


def _bytes16(x: jax.Array) -> jax.Array:
    """uint16[..., n] as uint8[..., 2 n], little-endian."""
    pairs = lax.bitcast_convert_type(x, jnp.uint8)
    return pairs.reshape(*x.shape[:-1], 2 * x.shape[-1])


def _half_bytes(x: jax.Array) -> jax.Array:
    return _bytes16(f32_to_f16_bits(x))


def _signed_scale(blocks: jax.Array, bits: int) -> Quantized:
    """Q4_0 and Q5_0: the first number of the largest magnitude becomes code 0."""
    magnitude = _magnitude(blocks)
    largest = jnp.max(magnitude, axis=-1, keepdims=True)
    place = np.arange(blocks.shape[-1], dtype=np.int32).reshape((1,) * (blocks.ndim - 1) + (-1,))
    first = jnp.min(jnp.where(magnitude == largest, place, np.int32(blocks.shape[-1])), axis=-1, keepdims=True)
    sign = jnp.max(jnp.where(place == first, bits_of(blocks) & _SIGN, np.uint32(0)), axis=-1, keepdims=True)
    exponent = _exponent(from_bits(largest))
    d = scale_by_power_of_two(from_bits(largest | (sign ^ _SIGN)), jnp.full_like(exponent, 1 - bits))
    unit = scale_by_power_of_two(blocks, jnp.broadcast_to(-exponent, blocks.shape))
    half, top = np.float32(2 ** (bits - 1) + 0.5), 2**bits - 1
    codes = _codes(unit, _inverse(d), exponent, lambda x: jnp.clip((x + half).astype(jnp.int32), 0, top))
    return _half_bytes(d), codes.astype(jnp.uint8)


def _scale_and_minimum(blocks: jax.Array, bits: int) -> Quantized:
    """Q4_1 and Q5_1: the smallest number is the minimum, the range is the scale times the highest code."""
    word = lax.bitcast_convert_type(bits_of(blocks), jnp.int32)
    # Integers in the order of the numbers: XLA's own comparison takes every subnormal for zero.
    key = jnp.where(word < 0, word ^ np.int32(0x7FFFFFFF), word)
    low, high = jnp.min(key, axis=-1, keepdims=True), jnp.max(key, axis=-1, keepdims=True)
    smallest, largest = (
        from_bits(lax.bitcast_convert_type(jnp.where(k < 0, k ^ np.int32(0x7FFFFFFF), k), jnp.uint32))
        for k in (low, high)
    )
    exponent = _exponent(_absmax(blocks))
    unit = scale_by_power_of_two(blocks, jnp.broadcast_to(-exponent, blocks.shape))
    unit_smallest = scale_by_power_of_two(smallest, -exponent)
    span = scale_by_power_of_two(scale_by_power_of_two(largest, -exponent) - unit_smallest, exponent)
    d = divide_by_integer(span, 2**bits - 1)
    codes = _codes(
        unit - unit_smallest,
        _inverse(d),
        exponent,
        lambda x: jnp.clip((x + np.float32(0.5)).astype(jnp.int32), 0, 2**bits - 1),
    )
    place = np.arange(blocks.shape[-1], dtype=np.int32).reshape((1,) * (blocks.ndim - 1) + (-1,))
    zeros = jnp.where(_magnitude(blocks) == np.uint32(0), 2 * place + (word < 0).astype(jnp.int32), np.int32(-1))
    last_zero = (jnp.max(zeros, axis=-1, keepdims=True) & np.int32(1)).astype(jnp.uint32) << np.uint32(31)
    is_zero = _magnitude(smallest) == np.uint32(0)
    minimum = jnp.where(is_zero, from_bits(last_zero), smallest)
    return _half_bytes(jnp.concatenate([d, minimum], axis=-1)), codes.astype(jnp.uint8)


def _rounded(blocks: jax.Array, d: jax.Array, largest: jax.Array) -> jax.Array:
    """int32 codes round(x / d), halves away from zero."""
    exponent = _exponent(largest)
    unit = scale_by_power_of_two(blocks, jnp.broadcast_to(-exponent, blocks.shape))
    return _codes(unit, _inverse(d), exponent, _round_half_away)


def _quantize_q8_0(blocks: jax.Array) -> Quantized:
    largest = _absmax(blocks)
    d = divide_by_integer(largest, 127)
    codes = _rounded(blocks, d, largest).astype(jnp.int8)
    return _half_bytes(d), lax.bitcast_convert_type(codes, jnp.uint8)


def _quantize_ternary(blocks: jax.Array) -> Quantized:
    d = _absmax(blocks)
    return _half_bytes(d), (_rounded(blocks, d, d) + np.int32(1)).astype(jnp.uint8)


@functools.cache
def _rounding_up_of_log2() -> np.ndarray:
    """uint32[278]: for n = -149 to 128, the least 24-bit mantissa below 2^n whose float32 log2 rounds to n.

    floor(log2(x)) as floats compute it is n there, not n - 1.
    """
    below = np.arange(1, 65)
    counts = []
    for n in range(-149, 129):
        rounds = (n + np.log1p(-below * 2.0**-24) / np.log(2.0)).astype(np.float32) == np.float32(n)
        counts.append(int(rounds.sum()))
    return (2**24 - np.asarray(counts)).astype(np.uint32)


def _quantize_mxfp4(blocks: jax.Array) -> Quantized:
    largest = _absmax(blocks)
    exponent = _exponent(largest)
    mantissa = _magnitude(scale_by_power_of_two(largest, -exponent)) - np.uint32(126 << 23)  # [2^23, 2^24)
    least = jnp.asarray(_rounding_up_of_log2()).at[exponent + np.int32(150)].get(mode="clip")
    log2_floor = exponent + (mantissa >= least).astype(jnp.int32)
    is_zero = _magnitude(largest) == np.uint32(0)
    e = jnp.where(is_zero, np.int32(0), log2_floor - np.int32(2) + np.int32(127)) & np.int32(255)
    # Doubled E2M1 values are spaced so that the nearest one, the smaller of two as near, is found by thresholds.
    unit = scale_by_power_of_two(blocks, jnp.broadcast_to(np.int32(128) - e, blocks.shape))
    size = jnp.abs(unit)
    code = sum((size > np.float32(t)).astype(jnp.int32) for t in (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0))
    # Next to float32's largest number log2 rounds up to 128, and numpy's 8 and 12 times that scale are infinite.
    code = jnp.minimum(code, jnp.where(e == 253, np.int32(5), np.int32(7)))
    code = jnp.where((unit < 0) & (code > 0), code + np.int32(8), code)
    return e.astype(jnp.uint8), code.astype(jnp.uint8)


def _nibbles(codes: jax.Array) -> jax.Array:
    """32 codes of 4 bits to 16 bytes: the first half of the block in the low nibbles."""
    return (codes[..., :16] & np.uint8(15)) | (codes[..., 16:] << np.uint8(4))


def _fifth_bits(codes: jax.Array) -> jax.Array:
    """The fifth bits of 32 codes as 4 bytes, lowest first."""
    bits = (codes >> np.uint8(4)).reshape(*codes.shape[:-1], 4, 8)
    places = np.arange(8, dtype=np.uint8).reshape((1,) * codes.ndim + (8,))
    return jnp.sum(bits << places, axis=-1, dtype=jnp.uint8)


def _digits(codes: jax.Array, count: int) -> jax.Array:
    """Bytes of `count` ternary digits each, the first of a strided run the most significant."""
    runs = codes.astype(jnp.int32).reshape(*codes.shape[:-1], count, codes.shape[-1] // count)
    powers = np.asarray([81, 27, 9, 3, 1][:count], np.int32).reshape((1,) * (codes.ndim - 1) + (count, 1))
    number = jnp.sum(runs * powers, axis=-2, dtype=jnp.int32)
    # A number below 243 as a fraction of 256, rounded up, so that multiplying by 3 carries its digits out.
    return ((number * np.int32(256) + np.int32(242)) // np.int32(243)).astype(jnp.uint8)


@dataclass(frozen=True)
class Encoder:
    """How a type is made, in two steps.

    quantize: float32[..., block_size] -> head bytes uint8[..., head] and codes uint8[..., block_size].
    pack: these to the arrays that, one after another, are the block's bytes.
    """

    block_size: int
    block_bytes: int
    quantize: Callable[[jax.Array], Quantized]
    pack: Callable[..., list[jax.Array]]


def _pack_4_bits(head: jax.Array, codes: jax.Array) -> list[jax.Array]:
    return [head, _nibbles(codes)]


def _pack_5_bits(head: jax.Array, codes: jax.Array) -> list[jax.Array]:
    return [head, _fifth_bits(codes), _nibbles(codes)]


def _pack_tq1_0(head: jax.Array, codes: jax.Array) -> list[jax.Array]:
    return [_digits(codes[..., 0:160], 5), _digits(codes[..., 160:240], 5), _digits(codes[..., 240:256], 4), head]


def _pack_tq2_0(head: jax.Array, codes: jax.Array) -> list[jax.Array]:
    runs = codes.reshape(*codes.shape[:-1], 2, 4, 32)
    places = np.asarray([0, 2, 4, 6], np.uint8).reshape((1,) * codes.ndim + (4, 1))
    packed = jnp.sum(runs << places, axis=-2, dtype=jnp.uint8)
    return [packed.reshape(*codes.shape[:-1], 64), head]


encoders: Mapping[str, Encoder] = MappingProxyType(
    {
        "F16": Encoder(1, 2, lambda blocks: (_half_bytes(blocks),), lambda head: [head]),
        "BF16": Encoder(1, 2, lambda blocks: (_bytes16(f32_to_bf16_bits(blocks)),), lambda head: [head]),
        "Q4_0": Encoder(32, 18, lambda blocks: _signed_scale(blocks, 4), _pack_4_bits),
        "Q4_1": Encoder(32, 20, lambda blocks: _scale_and_minimum(blocks, 4), _pack_4_bits),
        "Q5_0": Encoder(32, 22, lambda blocks: _signed_scale(blocks, 5), _pack_5_bits),
        "Q5_1": Encoder(32, 24, lambda blocks: _scale_and_minimum(blocks, 5), _pack_5_bits),
        "Q8_0": Encoder(32, 34, _quantize_q8_0, lambda head, codes: [head, codes]),
        "TQ1_0": Encoder(256, 54, _quantize_ternary, _pack_tq1_0),
        "TQ2_0": Encoder(256, 66, _quantize_ternary, _pack_tq2_0),
        "MXFP4": Encoder(32, 17, _quantize_mxfp4, _pack_4_bits),
    }
)


# Two programs, so that the codes are made once: within one, XLA's CPU fusion makes a block's codes anew for every
# byte that is packed from them (and ignores an optimization barrier), which took up to 50 times as long.
@functools.partial(jax.jit, static_argnums=0)
def _quantize_rows(type: str, w: jax.Array) -> Quantized:
    size = encoders[type].block_size
    return encoders[type].quantize(w.reshape(-1, w.shape[-1] // size, size))


@functools.partial(jax.jit, static_argnums=0)
def pack_rows(type: str, parts: Quantized) -> jax.Array:
    """uint8 [rows, row_bytes] of what `Encoder.quantize` made of [rows, blocks, block_size]."""
    blocks = jnp.concatenate(encoders[type].pack(*parts), axis=-1)
    return blocks.reshape(blocks.shape[0], -1)


def encode(type: str, w: Float32[Array | np.ndarray, "*rows n"]) -> UInt8[Array, "*rows row_bytes"]:
    """The rows of `w` in blocks of `type`, uint8[*rows, n / block_size * block_bytes]; compiled for each shape.

    Args:
      type: a key of `encoders`.
      w: finite float32 weights (see `check_finite`); F16 and BF16 take any.

    Raises:
      QjaxError: an unknown type, or rows that are no whole number of blocks.
    """
    if type not in encoders:
        raise QjaxError(f"expected a type to encode to, one of {', '.join(encoders)}; got {type!r}")
    size = encoders[type].block_size
    if w.ndim == 0 or w.shape[-1] % size:
        raise QjaxError(f"expected rows of a multiple of {size} weights for {type}, got shape {w.shape}")
    packed = pack_rows(type, _quantize_rows(type, jnp.asarray(w)))
    return packed.reshape(*w.shape[:-1], packed.shape[-1])


def check_finite(name: str, w: Float[Array | np.ndarray, "*s"]) -> None:
    """QjaxError naming the tensor, how many of its numbers are NaN or infinite, and where the first one is."""
    # Where it lies: to JAX, numpy's array would be copied first.
    bad = ~(np.isfinite(w) if isinstance(w, np.ndarray) else np.asarray(jnp.isfinite(w)))
    if bad.any():
        first = [int(i) for i in np.unravel_index(np.argmax(bad), bad.shape)]
        raise QjaxError(
            f"tensor {name!r}: expected finite weights, got {int(bad.sum())} of {bad.size} that are NaN or infinite "
            f"(the first at {first}); mend the source, or keep this tensor in a float type"
        )
