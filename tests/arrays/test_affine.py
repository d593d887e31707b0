"""Affine arrays of every width, with minimums and with zero points, against their definition written in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.arrays import AffineArray, Plane
from qjax.arrays.planes import pack
from qjax.errors import UnsupportedError
from qjax.formats.gguf import type_of

WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def unsigned(bits: int, rows: int, groups: int, group: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, groups, group), dtype=np.uint8)


def by_definition(
    codes: np.ndarray, scale: np.ndarray, offset: int, minimum: np.ndarray | None, zero: np.ndarray | None
) -> np.ndarray:
    """w = scale * (code - offset - zero) + minimum, group by group: integers first, then one float32 product."""
    rows, groups, _ = codes.shape
    w = np.empty(codes.shape, np.float32)
    for r in range(rows):
        for g in range(groups):
            whole = codes[r, g].astype(np.int64) - offset - (0 if zero is None else int(zero[r, g]))
            w[r, g] = np.float32(scale[r, g]) * whole.astype(np.float32)
            if minimum is not None:
                w[r, g] += np.float32(minimum[r, g])
    return w.reshape(rows, -1)


@jax.jit
def views(array: AffineArray) -> Any:
    return array.dequantize(), array.group_scales(), array.codes()


@given(
    bits=st.sampled_from(sorted(WIDTHS)),
    group=st.sampled_from([16, 32, 64]),
    stride=st.sampled_from([1, 2]),
    dtype=st.sampled_from([np.float16, np.float32]),
    extra=st.sampled_from(["", "zero", "minimum", "minimum zero"]),
    signed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20)  # most are a program of their own
def test_dequantize_is_its_definition(
    bits: int, group: int, stride: int, dtype: type, extra: str, signed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, groups = 6, 4
    codes = unsigned(bits, rows, groups, group, seed)
    scale = rng.standard_normal((rows, groups)).astype(dtype)
    # With float32 scales and a minimum, a fused multiply-add rounds once where numpy rounds twice.
    minimum = rng.standard_normal((rows, groups)).astype(np.float16) if "minimum" in extra else None
    if minimum is not None:
        scale = scale.astype(np.float16).astype(dtype)
    zero = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8) if "zero" in extra else None
    offset = 1 << (bits - 1) if signed else 0
    layout = tuple(Plane(width, stride) for width in WIDTHS[bits])
    flat = codes.reshape(rows, -1)
    planes = pack(flat ^ np.uint8(0x80) if bits == 8 and signed else flat, layout)
    array = jax.tree.map(jnp.asarray, AffineArray(planes, scale, minimum, layout, offset, zero=zero))
    want = by_definition(codes, scale, offset, minimum, zero)
    assert array.group_size == group
    floats, (scales, minimums), signed_codes = views(array)
    np.testing.assert_array_equal(floats, want)
    # What kernels compute with: the same up to the rounding of scale * zero.
    view = np.asarray(scales)[..., None] * np.asarray(signed_codes, np.float32).reshape(rows, groups, group)
    view = view if minimums is None else view + np.asarray(minimums)[..., None]
    np.testing.assert_allclose(view.reshape(rows, -1), want, rtol=1e-5, atol=1e-4)


def test_zero_points_are_subtracted_before_the_scale_multiplies() -> None:
    """scale * code - scale * zero would be off in the last bit for most of these."""
    codes = unsigned(8, 64, 2, 32, 0)
    rng = np.random.default_rng(1)
    scale, zero = rng.random((64, 2), np.float32), rng.integers(0, 256, (64, 2), dtype=np.uint8)
    array = AffineArray((codes.reshape(64, -1),), scale, None, (Plane(8, 1),), 0, zero=zero)
    array = jax.tree.map(jnp.asarray, array)
    exact = jax.jit(lambda a: a.dequantize())(array)
    np.testing.assert_array_equal(exact, by_definition(codes, scale, 0, None, zero))
    assert (np.asarray(exact)[codes.reshape(64, -1) == np.repeat(zero, 32, axis=1)] == 0).all()


def test_rows_and_layers_of_zero_points_go_with_their_weights() -> None:
    codes = unsigned(4, 8, 2, 32, 2)
    scale, zero = np.full((8, 2), 0.5, np.float16), np.arange(16, dtype=np.uint8).reshape(8, 2)
    layout = (Plane(4, 16),)
    array = jax.tree.map(jnp.asarray, AffineArray(pack(codes.reshape(8, -1), layout), scale, None, layout, zero=zero))
    want = by_definition(codes, scale, 0, None, zero)
    np.testing.assert_array_equal(array.dequantize(), want)
    np.testing.assert_array_equal(array.take(jnp.array([5, 2])), want[[5, 2]])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), array)
    np.testing.assert_array_equal(jax.vmap(lambda a: a.dequantize())(stacked)[1], want)
    assert array.nbytes == 8 * 64 // 2 + 16 * 2 + 16
    assert repr(array) == "AffineArray(8x64, 4-bit with zero, groups of 32, float16 scales, 4.75 bits/weight)"


@pytest.mark.parametrize(("bits", "offset", "kind"), [(4, 8, "Q4_0"), (8, 128, "Q8_0")])
def test_no_gguf_type_has_zero_points(bits: int, offset: int, kind: str) -> None:
    layout = (Plane(4, 16),) if bits == 4 else (Plane(8, 1),)
    planes = pack(unsigned(bits, 4, 2, 32, 3).reshape(4, -1), layout)
    array = AffineArray(planes, np.ones((4, 2), np.float16), None, layout, offset)
    assert type_of(array) == kind
    with pytest.raises(UnsupportedError, match=r"no GGUF type holds .*with zero.* without loss"):
        type_of(array.replace(zero=np.zeros((4, 2), np.uint8)))
