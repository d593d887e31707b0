"""Packed weights as GGUF's types: the same floats, by gguf's own decoder, or an error."""

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import TransformedArray, affine, codes_of
from qjax.errors import UnsupportedError
from qjax.formats.gguf.from_affine import blocks_of, type_for
from qjax.kernels.layout import lay_out

TYPES = [
    *((bits, zero, "Q4_0") for bits in (2, 3) for zero in (False, True)),
    (4, False, "Q4_0"),
    (4, True, "Q4_1"),
    (5, False, "Q5_0"),
    (5, True, "Q5_1"),
    *((6, zero, "Q8_0") for zero in (False, True)),
    (8, False, "Q8_0"),
]


def matrix(bits: int, groups: int, *, zero: bool = False, exact: bool = True) -> Any:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (16, 128)).astype(np.uint8)
    scale = rng.uniform(0.001, 1, (16, groups)).astype(np.float16)
    if exact and zero:
        # Of so few bits that their products with zero points are float16 as well.
        scale = np.exp2(np.floor(np.log2(scale))).astype(np.float16) * np.float16(1.5)
    zeros = rng.integers(0, 1 << bits, scale.shape).astype(np.uint8) if zero else None
    return affine(codes, scale, zeros, bits)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("bits", "zero", "name"), TYPES)
def test_gguf_decodes_the_same_floats(bits: int, zero: bool, name: str, groups: int) -> None:
    plain = matrix(bits, groups, zero=zero)
    whole = np.arange(128).reshape(groups, -1)[::-1, ::-1].ravel().astype(np.int32)
    rounded = TransformedArray(lay_out("w", plain), rounding="int8")
    for array in (plain, lay_out("w", plain), TransformedArray(plain, columns=whole), rounded):
        assert type_for(array) == name
        kind = gguf.GGMLQuantizationType[name]
        expected = np.asarray(jax.tree.map(jnp.asarray, array).dequantize())
        np.testing.assert_array_equal(gguf.quants.dequantize(blocks_of(array), kind), expected)


def test_few_bits_take_any_scales_and_zero_points() -> None:
    """GPTQ files have zero points one past the largest code, too."""
    for bits in (2, 3, 6):
        rough = matrix(bits, 4, zero=True, exact=False)
        array = affine(codes_of(rough), rough.scale, np.full(rough.scale.shape, 1 << bits, np.uint8), bits)
        kind = gguf.GGMLQuantizationType[type_for(array)]
        expected = np.asarray(jax.tree.map(jnp.asarray, array).dequantize())
        np.testing.assert_array_equal(gguf.quants.dequantize(blocks_of(array), kind), expected)
    wide = affine(codes_of(rough), rough.scale.astype(np.float32) * np.float32(1.0001), None, 6)
    with pytest.raises(UnsupportedError, match="scales of"):
        blocks_of(wide)
    far = affine(np.zeros((16, 128), np.uint8), np.ones((16, 4), np.float16), np.full((16, 4), 9, np.uint8), 3)
    with pytest.raises(UnsupportedError, match="zero points so far"):
        blocks_of(far)


def test_what_would_lose_is_refused() -> None:
    array = matrix(4, 4, zero=True, exact=False)
    assert type_for(array) == "Q4_1"
    with pytest.raises(UnsupportedError, match="zero point"):
        blocks_of(array)
    for other in (matrix(8, 4, zero=True), matrix(4, 8), matrix(2, 8)):
        with pytest.raises(UnsupportedError, match="no GGUF type holds"):
            type_for(other)
    mixed = np.random.default_rng(0).permutation(128).astype(np.int32)
    with pytest.raises(UnsupportedError, match="columns in their own order"):
        type_for(TransformedArray(matrix(4, 4), columns=mixed))
    with pytest.raises(UnsupportedError, match="inputs that are scaled"):
        type_for(TransformedArray(matrix(8, 4), input_scale=np.ones(128, np.float32), rounding="int8"))
