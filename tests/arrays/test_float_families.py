"""Packed weights whose values are floats, against the formulas of their formats in numpy, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.arrays import FloatCodebookArray, QuantizedArray, ScaledFloatArray, serves_lanes, to_lanes
from qjax.arrays.planes import Plane, pack
from qjax.kernels import native, qmatmul, select

LAYOUT = (Plane(4, 16),)


def on_device(array: Any) -> Any:
    return jax.tree.map(jnp.asarray, array)


@jax.jit
def dequantized(array: QuantizedArray) -> jax.Array:
    return array.dequantize()


@jax.jit
def views(array: QuantizedArray, rows: jax.Array) -> Any:
    return array.dequantize(), array.take(rows), array.plain()


def codebook(rows: int, columns: int, group: int, block: int | None) -> tuple[FloatCodebookArray, np.ndarray]:
    """A random array and its floats; packed scales in blocks of `block`, counted through all rows."""
    rng = np.random.default_rng(rows + columns)
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    table, groups = np.sort(rng.normal(size=16)).astype(np.float32), columns // group
    values = table[codes].reshape(rows, groups, group)
    if block is None:
        scale = rng.random((rows, groups), dtype=np.float32)
        array = FloatCodebookArray(pack(codes, LAYOUT), scale, table=tuple(map(float, table)))
        return array, (values * scale[..., None]).reshape(rows, columns)
    scale_table = np.sort(rng.normal(size=256)).astype(np.float32)
    index = rng.integers(0, 256, rows * groups, dtype=np.uint8)
    of_block = rng.random(-(-rows * groups // block), dtype=np.float32)
    scale = scale_table[index] * of_block[np.arange(rows * groups) // block] + np.float32(0.0123)
    first = np.arange(rows) * groups
    most = -(-groups // block) + 1
    supers = np.pad(of_block, (0, most))[first[:, None] // block + np.arange(most)]
    array = FloatCodebookArray(
        pack(codes, LAYOUT),
        index.reshape(rows, groups),
        supers,
        (first % block).astype(np.uint8)[:, None],
        table=tuple(map(float, table)),
        scale_table=scale_table.tobytes(),
        scale_block=block,
        scale_offset=float(np.float32(0.0123)),
    )
    return array, (values * scale.reshape(rows, groups, 1)).reshape(rows, columns)


@pytest.mark.parametrize("shape", [(64, 256, 64, None), (64, 256, 64, 256), (10, 352, 32, 8), (3, 64, 64, 256)])
def test_codebooks_of_floats(shape: tuple[int, int, int, int | None]) -> None:
    array, floats = codebook(*shape)
    assert array.shape == floats.shape
    # One multiply-add in place of two operations would round the scales otherwise.
    np.testing.assert_array_equal(dequantized(array), floats)
    if shape[0] == 3:  # operation by operation, each a program
        np.testing.assert_array_equal(array.dequantize(), floats)
    check_products(on_device(array), floats)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("block", "blocks"), [(None, 1), (64, 4), (100, 3)])
def test_8_bit_floats(kind: Any, block: int | None, blocks: int) -> None:
    values = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    scale = np.random.default_rng(0).random((4, blocks), dtype=np.float32)
    floats = values.view(getattr(ml_dtypes, kind)).astype(np.float32)
    floats = floats * (scale if block is None else np.repeat(scale, block, axis=1)[:, :256])
    array = on_device(ScaledFloatArray(values, scale, kind, block))
    np.testing.assert_array_equal(dequantized(array), floats)
    if block is None:
        np.testing.assert_array_equal(array.dequantize(), floats)
    finite = np.where(np.isfinite(floats), values, 0)
    array = array.replace(values=jnp.asarray(finite.astype(np.uint8)))  # pyright: ignore[reportAttributeAccessIssue]
    check_products(array, np.where(np.isfinite(floats), floats, 0.0).astype(np.float32))


def check_lanes(array: QuantizedArray, floats: np.ndarray, x: jax.Array, expected: np.ndarray) -> None:
    """In lanes, where they serve it: the same floats, there and back, and the native kernels' products."""
    if serves_lanes(array) is not None:
        assert array.group_size % 32 != 0 or array.shape[1] % 32  # pyright: ignore[reportAttributeAccessIssue]
        return
    lanes = on_device(to_lanes(array))
    all_rows, two, plain = views(lanes, jnp.asarray([2, 0]))
    np.testing.assert_array_equal(all_rows, floats)
    np.testing.assert_array_equal(two, floats[[2, 0]])
    for leaf, back in zip(jax.tree.leaves(array), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(leaf, back)
    name = "native" if native.available() else "xla-tiles"
    for activations in ("float", "int8"):
        for rows in (1, 3, 5):
            assert select(lanes, rows, activations).name == name
            products = qmatmul(x[:rows], lanes, activations=activations)
            size = np.abs(np.asarray(x)) @ np.abs(floats).T
            assert (np.abs(products - expected[:rows]) <= 2e-6 * size[:rows]).all()


def check_products(array: QuantizedArray, floats: np.ndarray) -> None:
    """Products, rows that are looked up, and that no kernel of integer codes takes it for its own."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, floats.shape[1])).astype(np.float32))
    expected = np.asarray(x) @ floats.T
    for activations in ("float", "int8"):
        products = qmatmul(x, array, activations=activations)
        np.testing.assert_allclose(products, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(views(array, jnp.asarray([2, 0, 2]))[1], floats[[2, 0, 2]])
    check_lanes(array, floats, x, expected)
    assert str(array.shape[1]) in repr(array)


def test_8_bit_floats_that_are_no_numbers_stay_in_rows() -> None:
    values = np.zeros((16, 32), np.uint8)
    values[3, 5] = 0xFF
    array = ScaledFloatArray(values, np.ones((16, 1), np.float32))
    assert serves_lanes(array) == "values that are no numbers"
    assert np.isnan(np.asarray(on_device(array).dequantize())).sum() == 1
