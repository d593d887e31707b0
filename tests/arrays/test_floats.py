"""Every pattern of the 8- and 16-bit formats, and float32's corners, against numpy, ml_dtypes and gguf."""

import warnings

import gguf.quants as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import floats

ALL8 = np.arange(256, dtype=np.uint8)
ALL16 = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def same_bits(array: jax.Array, want: np.ndarray) -> None:
    """Equal bit for bit, -0.0 and subnormals included; where one has a NaN the other has one."""
    got = np.asarray(array)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def float32_corners(count: int = 400_000) -> np.ndarray:
    """Random bit patterns (all exponents alike), neighbours of every power of two and float16 number."""
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**32, count, dtype=np.uint32)
    powers = np.arange(0, 256, dtype=np.uint32) << 23
    halves = np.arange(0, 0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = ((halves[:-1].astype(np.float64) + halves[1:].clip(max=65536)) / 2).astype(np.float32)
    centres = np.concatenate([powers, halves.view(np.uint32), ties.view(np.uint32)])
    near = (centres[:, None] + np.arange(-3, 4, dtype=np.int64)[None]).clip(0, 2**32 - 1).astype(np.uint32).ravel()
    small = np.arange(0, 2000, dtype=np.uint32)
    bits = np.concatenate([random, near, small])
    return np.concatenate([bits, bits ^ np.uint32(1 << 31)]).view(np.float32)


@pytest.fixture(params=[pytest.param("eager", marks=pytest.mark.slow), "jit"])
def run(request):
    return jax.jit if request.param == "jit" else lambda function: function


def test_f16_every_pattern(run):
    want = ALL16.view(np.float16).astype(np.float32)
    same_bits(run(floats.f16_to_f32)(jnp.asarray(ALL16)), want)
    as_half = jax.lax.bitcast_convert_type(jnp.asarray(ALL16), jnp.float16)
    same_bits(run(floats.f16_to_f32)(as_half), want)
    same_bits(run(floats.f16_to_f32)(ALL16.view(np.float16)), want)


def test_bf16_every_pattern(run):
    want = (ALL16.astype(np.uint32) << 16).view(np.float32)
    same_bits(run(floats.bf16_to_f32)(jnp.asarray(ALL16)), want)
    same_bits(run(floats.bf16_to_f32)(jax.lax.bitcast_convert_type(jnp.asarray(ALL16), jnp.bfloat16)), want)
    decoded = oracle.BF16.dequantize(ALL16.view(np.uint8).reshape(256, -1)).reshape(-1)
    same_bits(run(floats.bf16_to_f32)(jnp.asarray(ALL16)), decoded)


def test_e8m0_every_pattern(run):
    with np.errstate(over="ignore"):
        want = oracle.MXFP4.e8m0_to_fp32_half(ALL8)
    same_bits(run(floats.e8m0_half_to_f32)(ALL8), want)


def test_ue4m3_every_pattern(run):
    same_bits(run(floats.ue4m3_to_f32)(ALL8), oracle.NVFP4.ue4m3_to_fp32(ALL8).astype(np.float32))


def test_scaling_by_powers_of_two_is_ldexp(run):
    x = float32_corners(100_000)
    exponent = np.random.default_rng(1).integers(-320, 320, x.shape).astype(np.int32)
    with np.errstate(all="ignore"):
        # float64 holds every product exactly, so that the one rounding is the conversion's.
        want = np.ldexp(x.astype(np.float64), exponent).astype(np.float32)
    same_bits(run(floats.scale_by_power_of_two)(x, exponent), want)


def test_mxfp4_products_are_exact(run):
    """The doubled E2M1 values under every E8M0 scale, the subnormal products among them."""
    values = np.array(oracle.MXFP4.kvalues, dtype=np.float32)
    with np.errstate(over="ignore"):
        want = oracle.MXFP4.e8m0_to_fp32_half(ALL8)[:, None] * values
    exponent = np.broadcast_to(ALL8.astype(np.int32)[:, None] - 128, want.shape)
    same_bits(run(floats.scale_by_power_of_two)(np.broadcast_to(values, want.shape), exponent), want)


def test_reciprocal_is_correctly_rounded(run):
    # Random mantissas over the exponents whose reciprocal is subnormal: double rounding would show here.
    rng = np.random.default_rng(2)
    huge = (rng.integers(0, 2**23, 1_000_000) + (rng.integers(252, 255, 1_000_000) << 23)).astype(np.uint32)
    x = np.concatenate([float32_corners(100_000), huge.view(np.float32)])
    with np.errstate(all="ignore"):
        want = np.float32(1) / x
    same_bits(run(floats.reciprocal)(x), want)


def test_reciprocal_decides_near_ties_by_the_true_quotient(run):
    """Divisors whose rounded quotient is half way between two subnormals, the true one beside it."""
    candidates = np.arange(2**23, 2**24, dtype=np.int64)
    quotient = (2.0**47 / candidates).astype(np.float32).astype(np.int64)
    tie = (quotient % 4 == 2) & (candidates * quotient != 2**47)
    divisors = np.ldexp(candidates[tie].astype(np.float64), 254 - 150).astype(np.float32)[::7]
    assert divisors.size > 1000
    with np.errstate(all="ignore"):
        want = np.float32(1) / divisors
    same_bits(run(floats.reciprocal)(divisors), want)


@pytest.mark.parametrize("divisor", [1, 7, 15, 31, 127])
def test_division_by_an_integer_is_correctly_rounded(divisor):
    x = float32_corners(100_000)
    with np.errstate(invalid="ignore"):
        want = x / np.float32(divisor)
    same_bits(jax.jit(floats.divide_by_integer, static_argnums=1)(x, divisor), want)


def test_f32_to_f16(run):
    x = float32_corners()
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = x.astype(np.float16).view(np.uint16)
    nan = np.isnan(x)
    got = np.asarray(run(floats.f32_to_f16_bits)(x))
    np.testing.assert_array_equal(got[~nan], want[~nan])
    assert np.isnan(got[nan].view(np.float16)).all()


def test_f32_to_bf16_as_gguf_does(run):
    x = float32_corners()
    want = oracle.BF16.quantize(x).view(np.uint16)
    np.testing.assert_array_equal(np.asarray(run(floats.f32_to_bf16_bits)(x)), want)


def test_a_half_survives_there_and_back(run):
    back = run(lambda half: floats.f32_to_f16_bits(floats.f16_to_f32(half)))(jnp.asarray(ALL16))
    finite = np.isfinite(ALL16.view(np.float16))
    np.testing.assert_array_equal(np.asarray(back)[finite], ALL16[finite])
