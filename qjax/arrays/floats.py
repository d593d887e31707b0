"""Small float formats to float32 and back, exactly, by integer operations alone.

Why not `astype`: XLA on CPUs flushes float32 subnormals to zero and canonicalises float16 NaNs, and either
would break the promise that unpacked weights equal the reference bit for bit. A bitcast does neither, and a
`where` only moves bits, so everything here that could meet a subnormal stays in uint32.

Sources: `gguf.quants` (MXFP4.e8m0_to_fp32_half, NVFP4.ue4m3_to_fp32, BF16.quantize_blocks), numpy's half.c,
and the OCP Microscaling Formats specification v1.0 for E8M0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float16, Float32, Int32, UInt8, UInt16

_U32 = jnp.uint32
_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INF = np.uint32(0x7F800000)
_MANTISSA = np.uint32(0x007FFFFF)
_HIDDEN = np.uint32(0x00800000)

HalfBits = Float16[Array | np.ndarray, "*s"] | UInt16[Array | np.ndarray, "*s"]
BrainBits = BFloat16[Array | np.ndarray, "*s"] | UInt16[Array | np.ndarray, "*s"]


def bits_of(x: Float32[Array | np.ndarray, "*s"]) -> jax.Array:
    """The bits of float32 numbers as uint32, subnormals and NaN payloads included."""
    return lax.bitcast_convert_type(jnp.asarray(x), _U32)


def from_bits(bits: jax.Array) -> jax.Array:
    """float32 numbers from their uint32 bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def _bits16(x: jax.Array | np.ndarray) -> jax.Array:
    return lax.bitcast_convert_type(jnp.asarray(x), jnp.uint16).astype(_U32)


def f16_to_f32(x: HalfBits) -> Float32[Array, "*s"]:
    """IEEE binary16, as float16 or as its uint16 bits, to float32: exact; a NaN keeps sign and payload."""
    half = _bits16(x)
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    magnitude = half & np.uint32(0x7FFF)
    normal = (magnitude << np.uint32(13)) + np.uint32(112 << 23)
    special = (magnitude << np.uint32(13)) | _INF
    # A float16 subnormal is a count of 2^-24, which float32 holds as a normal number (or zero).
    subnormal = bits_of(magnitude.astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24))
    bits = jnp.where(magnitude >= np.uint32(0x7C00), special, normal)
    return from_bits(sign | jnp.where(magnitude < np.uint32(0x0400), subnormal, bits))


def bf16_to_f32(x: BrainBits) -> Float32[Array, "*s"]:
    """bfloat16, or its uint16 bits, to float32: the upper half of the word, nothing flushed."""
    return from_bits(_bits16(x) << np.uint32(16))


def e8m0_half_to_f32(x: UInt8[Array | np.ndarray, "*s"]) -> Float32[Array, "*s"]:
    """Half of E8M0, 2^(x - 128), ggml's scale of MXFP4's doubled values (x of 0 and 1: subnormal)."""
    code = jnp.asarray(x).astype(_U32)
    tiny = np.uint32(0x00200000) << code
    return from_bits(jnp.where(code < np.uint32(2), tiny, (code - np.uint32(1)) << np.uint32(23)))


def ue4m3_to_f32(x: UInt8[Array | np.ndarray, "*s"]) -> Float32[Array, "*s"]:
    """Half of unsigned E4M3 (bias 7), as ggml scales NVFP4's doubled values; bit 7 is ignored, 0x7F is 0."""
    code = jnp.asarray(x).astype(_U32)
    exponent, mantissa = (code >> np.uint32(3)) & np.uint32(15), code & np.uint32(7)
    normal = from_bits(((exponent + np.uint32(119)) << np.uint32(23)) | (mantissa << np.uint32(20)))
    subnormal = mantissa.astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-10)
    value = jnp.where(exponent == np.uint32(0), subnormal, normal)
    return jnp.where(code == np.uint32(0x7F), np.float32(0), value)


def _split(magnitude: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mantissa in [2^23, 2^24) and int32 e of a finite nonzero number: mantissa * 2^(e - 150)."""
    field = magnitude >> np.uint32(23)
    # Only subnormals have leading zeros to shift out: their highest bit is moved to the hidden bit's place.
    shift = lax.clz(magnitude & _MANTISSA) - np.uint32(8)
    mantissa = jnp.where(field == np.uint32(0), magnitude << shift, (magnitude & _MANTISSA) | _HIDDEN)
    exponent = jnp.where(field == np.uint32(0), np.int32(1) - shift.astype(jnp.int32), field.astype(jnp.int32))
    return mantissa, exponent


def _join(
    mantissa: jax.Array, exponent: jax.Array, remainder: jax.Array | None = None, excess: jax.Array | None = None
) -> jax.Array:
    """Bits of mantissa * 2^(exponent - 150), mantissa in [2^23, 2^24), to nearest even where subnormal.

    `excess` is the number of bits that the mantissa is wider than 24, to be rounded away first (the exponent is
    that of its highest 24 bits). `remainder` tells on which side of the mantissa the true number lies (its
    sign), which decides what would else be a tie.
    """
    # Beyond 25 places nothing is left to round up; shifts by 32 and more are undefined.
    places = jnp.clip(np.int32(1) - exponent, 0, 25)
    if excess is not None:
        places = jnp.minimum(places + excess, 31)
    places = places.astype(_U32)
    kept = mantissa >> places
    dropped = mantissa - (kept << places)
    half = (np.uint32(1) << places) >> np.uint32(1)
    odd = (kept & np.uint32(1)) == np.uint32(1)
    if remainder is None:
        tie_goes_up = odd
    else:
        tie_goes_up = (remainder > 0) | ((remainder == 0) & odd)
    up = (places > np.uint32(0)) & ((dropped > half) | ((dropped == half) & tie_goes_up))
    # Adding the mantissa with its hidden bit raises the field by one: hence e - 1, and a carry that is right.
    field = jnp.clip(exponent - np.int32(1), 0, 254).astype(_U32) << np.uint32(23)
    return jnp.where(exponent > 254, _INF, field + kept + up.astype(_U32))


def scale_by_power_of_two(
    x: Float32[Array | np.ndarray, "*s"], exponent: Int32[Array | np.ndarray, "*s"]
) -> Float32[Array, "*s"]:
    """x * 2^exponent as IEEE rounds it: to nearest even where the result is subnormal, to infinity beyond.

    Zeros keep their sign, infinities and NaNs are returned as they are. Any int32 exponent within +-2^30.
    """
    bits = bits_of(x)
    magnitude = bits & _MAGNITUDE
    mantissa, field = _split(magnitude)
    scaled = _join(mantissa, field + jnp.asarray(exponent))
    unmoved = (magnitude == np.uint32(0)) | (magnitude >= _INF)
    return from_bits((bits & _SIGN) | jnp.where(unmoved, magnitude, scaled))


def reciprocal(x: Float32[Array | np.ndarray, "*s"]) -> Float32[Array, "*s"]:
    """1 / x as IEEE rounds it, for subnormal x and subnormal results too; NaN gives NaN."""
    bits = bits_of(x)
    magnitude = bits & _MAGNITUDE
    mantissa, field = _split(magnitude)
    one_to_two = from_bits((mantissa & _MANTISSA) | np.uint32(127 << 23))
    quotient = bits_of(np.float32(1) / one_to_two)  # in (1/2, 1]: never subnormal, correctly rounded
    q_mantissa, q_field = _split(quotient)
    # The quotient was rounded once already. Its error is the sign of 2^47 - mantissa * q_mantissa (2^46 for a
    # power of two), whose absolute value is below 2^24, so that the low 32 bits hold all of it.
    error = lax.bitcast_convert_type(np.uint32(0) - mantissa * q_mantissa, jnp.int32)
    inverse = _join(q_mantissa, q_field + np.int32(127) - field, error)
    inverse = jnp.where(magnitude == np.uint32(0), _INF, jnp.where(magnitude == _INF, np.uint32(0), inverse))
    return from_bits((bits & _SIGN) | jnp.where(magnitude > _INF, magnitude, inverse))


def divide_by_integer(x: Float32[Array | np.ndarray, "*s"], divisor: int) -> Float32[Array, "*s"]:
    """x / divisor, 1 to 127, as IEEE rounds it, subnormals included.

    XLA turns a division by a constant into a multiplication by its rounded inverse, which is another number; and
    rounding to 24 bits before rounding to a subnormal would round twice. An integer division does neither.
    """
    bits = bits_of(x)
    magnitude = bits & _MAGNITUDE
    mantissa, field = _split(magnitude)
    widened = mantissa << np.uint32(8)
    quotient = widened // np.uint32(divisor)
    remainder = (widened - quotient * np.uint32(divisor)).astype(jnp.int32)
    # 25 to 32 bits are left: all but the highest 24 are rounded away, together with what a subnormal drops.
    excess = (np.uint32(8) - lax.clz(quotient)).astype(jnp.int32)
    divided = _join(quotient, field - np.int32(8) + excess, remainder, excess)
    unmoved = (magnitude == np.uint32(0)) | (magnitude >= _INF)
    return from_bits((bits & _SIGN) | jnp.where(unmoved, magnitude, divided))


def divide(x: Float32[Array, "*s"], divisor: Float32[Array, "*#s"]) -> Float32[Array, "*s"]:
    """x / divisor as IEEE rounds it, for a divisor that is broadcast; NaN where x is not finite.

    XLA multiplies by the inverse of what is broadcast, which rounds twice; so each number gets a divisor of its own.
    """
    return x / (divisor + 0 * x)


def f32_to_f16_bits(x: Float32[Array | np.ndarray, "*s"]) -> UInt16[Array, "*s"]:
    """float32 to the bits of float16 as numpy's `astype`: to nearest even, from 65520 on infinity."""
    bits = bits_of(x)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & _MAGNITUDE
    # Normal: drop 13 bits; the carry walks into the exponent, and past the largest number into infinity.
    rebased = magnitude - np.uint32(112 << 23)
    rounded = (rebased + np.uint32(0xFFF) + ((rebased >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    normal = jnp.minimum(rounded, np.uint32(0x7C00))
    # Subnormal: a count of 2^-24; adding 0.5 = 2^23 * 2^-24 leaves that count, rounded, in the low bits.
    counted = bits_of(from_bits(magnitude) + np.float32(0.5)) - np.uint32(126 << 23)
    nan = np.uint32(0x7C00) | jnp.maximum((magnitude & _MANTISSA) >> np.uint32(13), np.uint32(1))
    half = jnp.where(magnitude < np.uint32(113 << 23), counted, normal)
    half = jnp.where(magnitude >= _INF, np.uint32(0x7C00), half)
    return (sign | jnp.where(magnitude > _INF, nan, half)).astype(jnp.uint16)


def f32_to_bf16_bits(x: Float32[Array | np.ndarray, "*s"]) -> UInt16[Array, "*s"]:
    """float32 to the bits of bfloat16 as ggml: to nearest even, nothing flushed, a NaN made quiet."""
    bits = bits_of(x)
    is_nan = (bits & _MAGNITUDE) > _INF
    bits = jnp.where(is_nan, (bits & np.uint32(0xFFFF0000)) | np.uint32(64 << 16), bits)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(jnp.uint16)
