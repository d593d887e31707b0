"""Weights whose input is changed first, against the plain product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import Scheme, TransformedArray
from qjax.arrays.transformed import round_activations
from qjax.kernels import qmatmul
from qjax.kernels.layout import lay_out
from qjax.quantizers.rtn import rtn


@pytest.fixture
def parts() -> Any:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(24, 64)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(5, 64)).astype(np.float32))
    return w, x, jnp.asarray(rng.permutation(64).astype(np.int32)), jnp.asarray(rng.uniform(0.5, 2, 64), jnp.float32)


@pytest.mark.parametrize("lanes", [False, True])
def test_products_are_of_the_weight_it_stands_for(parts: Any, lanes: bool) -> None:
    _, x, columns, scale = parts
    inner = rtn((parts[0] * scale[None])[:, columns], Scheme(8, 32))
    array = TransformedArray(inner, columns, scale)
    held = jax.tree.map(jnp.asarray, lay_out("w", array)) if lanes else array
    assert held.shape == (24, 64)
    np.testing.assert_allclose(held.dequantize(), parts[0], atol=0.06)
    np.testing.assert_allclose(qmatmul(x, held), x @ array.dequantize().T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(held.take(jnp.asarray([3, 1])), array.dequantize()[jnp.asarray([3, 1])])


def test_rounded_activations_have_a_scale_a_token(parts: Any) -> None:
    w, x, _, _ = parts
    inner = rtn(w, Scheme(8, -1))
    codes, scale = round_activations(x, "int8")
    assert codes.dtype == jnp.int8
    step = np.abs(np.asarray(x)).max(1, keepdims=True) / 127.5
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    assert (np.abs(np.asarray(codes) - np.asarray(x) / step) <= 0.5001).all()
    y = qmatmul(x, TransformedArray(inner, rounding="int8"))
    rounded = np.asarray(codes, np.float32) * np.asarray(scale)
    np.testing.assert_allclose(y, rounded @ np.asarray(inner.dequantize()).T, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(y) - np.asarray(x @ inner.dequantize().T)).max() > 1e-3
