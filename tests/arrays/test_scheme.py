"""Schemes as texts, and codes to arrays and back."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.arrays import LaneBlockedArray, QuantizedArray, Scheme, affine, codes_of, parse_scheme, to_lanes
from qjax.arrays.scheme import BITS
from qjax.errors import QjaxError

SCHEMES = st.builds(
    Scheme,
    st.sampled_from(BITS),
    st.sampled_from([-1, 0, 32, 64, 128]),
    st.booleans(),
    st.sampled_from(["float", "int8"]),
)


@given(SCHEMES)
def test_a_scheme_is_its_text(scheme: Scheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize("text", ["", "w7", "w4g", "w4g0", "4bit", "w4-sym", "w4g-1", "w44g128"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(QjaxError, match="expected"):
        parse_scheme(text)


@jax.jit
def dequantized(array: QuantizedArray) -> jax.Array:
    return array.dequantize()


@given(
    st.sampled_from(BITS),
    st.sampled_from([(5, 96), (4, 8), (1, 24)]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_arrays_hold_the_codes(bits: int, shape: tuple[int, int], asymmetric: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    scale = rng.uniform(0.01, 1, (shape[0], 1)).astype(np.float16)
    zero = rng.integers(0, 1 << bits, (shape[0], 1)).astype(np.uint8) if asymmetric else None
    array = affine(codes, scale, zero, bits)
    assert isinstance(array.planes[0], np.ndarray)
    np.testing.assert_array_equal(codes_of(array), codes)
    point = np.float32(1 << (bits - 1)) if zero is None else zero.astype(np.float32)
    want = scale.astype(np.float32) * (codes.astype(np.float32) - point)
    np.testing.assert_array_equal(dequantized(array), want)
    if shape[1] % 32 == 0:
        lanes = to_lanes(array)
        assert isinstance(lanes, LaneBlockedArray)
        np.testing.assert_array_equal(codes_of(lanes.plain()), codes)
        np.testing.assert_array_equal(dequantized(lanes), want)
