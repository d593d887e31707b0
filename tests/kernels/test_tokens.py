"""W8A8: rows of x rounded to int8 with one scale each, against int64 arithmetic; and what changes x first."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import AffineArray, Scheme, TransformedArray, to_lanes
from qjax.kernels import explain, native, qmatmul, qmatmuls, select
from qjax.kernels.tokens import matmul_tokens
from qjax.quantizers.rtn import rtn


def affine(scheme: Scheme, out: int = 40, columns: int = 512, seed: int = 0) -> AffineArray:
    w = np.random.default_rng(seed).standard_normal((out, columns)).astype(np.float32)
    return rtn(jnp.asarray(w), scheme)


def lanes(array: Any) -> Any:
    return jax.tree.map(jnp.asarray, to_lanes(array))


def inputs(rows: int, columns: int = 512, seed: int = 1) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    # Tokens of very different sizes, and one of nothing.
    x *= np.logspace(-3, 3, rows, dtype=np.float32)[:, None]
    if rows > 2:
        x[1] = 0
    return jnp.asarray(x)


def wanted(x: Any, array: AffineArray, x_scale: float | None = None) -> np.ndarray:
    """sx * sum_g scale * (integer sum), in int64 and float64; written anew, by compressed-tensors' definition."""
    x = np.asarray(x)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127.5) if x_scale is None else np.float32(x_scale)
    scale = np.where(scale == 0, np.float32(1), scale)
    qx = np.clip(np.rint(x / scale), -128, 127).astype(np.int64)
    groups = array.scale.shape[-1]
    codes = np.asarray(array.codes()).astype(np.int64)
    if array.zero is not None:
        codes = codes - np.repeat(np.asarray(array.zero).astype(np.int64), array.group_size, -1)
    split = lambda a: a.reshape(len(a), groups, -1)
    dots = np.einsum("mgi,ogi->mog", split(qx), split(codes))
    return scale.astype(np.float64) * (dots * np.asarray(array.scale, np.float64)).sum(-1)


SCHEMES = [Scheme(8, -1), Scheme(8, 0), Scheme(8, 128), Scheme(8, 32), Scheme(4, 128), Scheme(4, 64, symmetric=False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("make", [lanes, lambda array: array], ids=["lanes", "rows"])
@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_products_are_those_of_integers(scheme: Scheme, make: Callable[[Any], Any], x_scale: float | None) -> None:
    array = affine(scheme)
    fixed = None if x_scale is None else jnp.float32(x_scale)
    weight = TransformedArray(make(array), x_scale=fixed, rounding="int8")
    for rows in (1, 3, 40):
        x = inputs(rows)
        y = wanted(x, array, x_scale)
        size = np.abs(y).max(-1, keepdims=True) + 1e-30
        # Whatever is asked for of activations: nothing is rounded twice.
        for activations in ("float", "int8"):
            assert (np.abs(np.asarray(qmatmul(x, weight, activations=activations)) - y) <= 3e-7 * size).all()


def test_sums_are_exact_where_floats_are_not() -> None:
    """2**16 products of the largest codes and one more: a float32 sum would lose the one."""
    columns = 1 << 16
    codes = np.full((1, columns), 255, np.uint8) ^ np.uint8(128)
    codes[0, -1] = np.uint8(1)
    array = AffineArray((codes,), np.ones((1, 1), np.float16), None, (*affine(Scheme(8, -1)).layout,), 128)
    x = np.full((1, columns), 127, np.float32)
    x[0, -1] = 1
    weight = TransformedArray(lanes(array), x_scale=jnp.float32(1), rounding="int8")
    exact = 127 * 127 * (columns - 1) + 1
    assert float(qmatmul(jnp.asarray(x), weight)[0, 0]) == np.float32(exact)
    assert float(matmul_tokens(jnp.asarray(x), weight.plain())[0, 0]) == np.float32(exact)


def test_the_kernel_can_be_asked_for() -> None:
    w8a8 = TransformedArray(lanes(affine(Scheme(8, -1))), rounding="int8")
    here = native.available()
    for activations in ("float", "int8"):
        assert select(w8a8, 1, activations).name == ("native-w8a8" if here else "xla-w8a8")
        assert select(w8a8.plain(), 1, activations).name == "xla-w8a8"
    assert "int8 activations, a token scale" in explain(w8a8, 1)
    # Codes of all 8 bits with zero points are no signed bytes; 8-bit floats are no integers.
    unsigned = TransformedArray(affine(Scheme(8, -1, symmetric=False)), rounding="int8")
    for weight in (unsigned, unsigned.replace(inner=lanes(unsigned.inner))):
        assert select(weight, 1).name == "rounded"
        x = inputs(3)
        y = wanted(x, unsigned.inner)
        np.testing.assert_allclose(qmatmul(x, weight, activations="int8"), y, atol=1e-4 * np.abs(y).max(), rtol=1e-4)
    assert select(w8a8.replace(rounding="float8_e4m3fn"), 1, "int8").name == "rounded"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(number: float) -> None:
    weight = TransformedArray(lanes(affine(Scheme(8, -1))), rounding="int8")
    y = np.asarray(qmatmul(inputs(2).at[1, 3].set(number), weight))
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def transformed(seed: int, array: Any, **options: Any) -> TransformedArray:
    rng = np.random.default_rng(seed)
    columns = jnp.asarray(rng.permutation(512).astype(np.int32))
    scale = jnp.asarray(rng.uniform(0.5, 2, 512).astype(np.float32))
    return TransformedArray(array, **{"columns": columns, "input_scale": scale} | options)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("changes", [{}, {"columns": None}, {"input_scale": None}], ids=str)
def test_x_is_changed_alike_in_lanes_and_in_rows(activations: str, changes: dict[str, Any]) -> None:
    plain = transformed(0, affine(Scheme(4, 128)), **changes)
    held = plain.replace(inner=lanes(plain.inner))
    for rows in (1, 3, 40):
        x = inputs(rows)
        theirs = np.asarray(qmatmul(x, plain, activations=activations))
        ours = np.asarray(qmatmul(x, held, activations=activations))
        assert (np.abs(ours - theirs) <= 3e-6 * (np.abs(theirs).max(-1, keepdims=True) + 1e-30)).all()


@pytest.mark.parametrize("rounding", [None, "int8"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_weights_that_share_x_go_together(rounding: Any, activations: str) -> None:
    """Those that change x alike, and those that do not: the bits of each alone."""
    make = lambda seed, out: lanes(affine(Scheme(8, 128), out, seed=seed))
    one, other = transformed(0, make(0, 40), rounding=rounding), transformed(1, make(1, 24), rounding=rounding)
    mixes = [[one, one.replace(inner=make(2, 16)), other, one]]
    if rounding is None:
        mixes.append([one, lanes(affine(Scheme(4, 32))), other])
    for weights in mixes:
        for rows in (1, 20):
            x = inputs(rows)
            for y, weight in zip(qmatmuls(x, weights, activations=activations), weights, strict=True):
                np.testing.assert_array_equal(y, qmatmul(x, weight, activations=activations))


@pytest.mark.skipif(not native.available(), reason="one call of the native kernels")
def test_one_call_for_what_shares_x() -> None:
    weights = [transformed(0, lanes(affine(Scheme(8, -1), seed=seed)), rounding="int8") for seed in range(3)]
    program = jax.jit(qmatmuls).lower(inputs(1), weights).as_text()
    assert program.count("custom_call @qjax_matmul_ffi") == 1


def test_columns_that_are_not_there_give_no_numbers() -> None:
    held = transformed(0, lanes(affine(Scheme(4, 128))), input_scale=None)
    for wrong in (512, -1, 1 << 30):
        y = qmatmul(inputs(1), held.replace(columns=held.columns.at[5].set(wrong)))
        if native.available():
            assert np.isnan(np.asarray(y)).all()


@pytest.mark.parametrize("make", [lanes, lambda array: array], ids=["lanes", "rows"])
def test_gradients_are_those_of_the_floats(make: Callable[[Any], Any]) -> None:
    weight = transformed(0, make(affine(Scheme(8, -1))), rounding="int8")
    x, up = inputs(3), inputs(3, 40, seed=2)
    ours = jax.jit(jax.grad(lambda x: jnp.sum(up * qmatmul(x, weight))))(x)
    theirs = up @ weight.dequantize()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3 * float(jnp.abs(theirs).max()))


def test_no_float_copy_of_the_weight() -> None:
    array = affine(Scheme(8, -1), 2048, 1024)
    for weight in (TransformedArray(lanes(array), rounding="int8"), TransformedArray(array, rounding="int8")):
        for rows in (1, 64):
            compiled = jax.jit(qmatmul).lower(inputs(rows, 1024), weight).compile()
            held = compiled.memory_analysis().temp_size_in_bytes
            assert held <= 4 * 2048 * 1024 // 4 + 2 * 4 * rows * (2048 + 1024)
