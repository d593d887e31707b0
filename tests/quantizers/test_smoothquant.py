"""SmoothQuant on arrays: the paper's formula, and what it is for: large columns of activations."""

import jax.numpy as jnp
import numpy as np

from qjax.arrays import Scheme, TransformedArray
from qjax.kernels import qmatmul
from qjax.quantizers.rtn import rtn
from qjax.quantizers.smoothquant import ALPHAS, search_alpha, smooth_scale

W8A8 = Scheme(8, -1, activations="int8")


def layer(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(64, 128)).astype(np.float32), rng.normal(size=(48, 128)).astype(np.float32)
    x[:, [3, 70]] *= 60
    return x, w


def product_error(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> float:
    array = TransformedArray(rtn(jnp.asarray(w * scale), W8A8), input_scale=jnp.asarray(scale), rounding="int8")
    return float(np.square(np.asarray(qmatmul(jnp.asarray(x), array)) - x @ w.T).sum())


def test_scale_is_the_paper_s() -> None:
    x, w = layer(0)
    x_most, w_most = np.abs(x).max(0), np.abs(w).max(0)
    x_most[9] = 0
    found = np.asarray(smooth_scale(jnp.asarray(x_most), jnp.asarray(w_most), 0.7))
    expected = x_most**0.7 / w_most**0.3
    expected[9] = 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_large_columns_cost_less_and_the_search_is_exact() -> None:
    x, w = layer(1)
    x_most, w_most = jnp.abs(jnp.asarray(x)).max(0), jnp.abs(jnp.asarray(w)).max(0)
    found = search_alpha((jnp.asarray(w),), (W8A8,), x_most, jnp.asarray(x))
    plain = product_error(x, w, np.ones(128, np.float32))
    best = product_error(x, w, np.asarray(found.scale))
    half = product_error(x, w, np.asarray(smooth_scale(x_most, w_most, 0.5)))
    assert best < 0.2 * plain
    assert best <= half * 1.02
    # The largest number of a row lies half-way between two codes: a last bit says which one it gets.
    np.testing.assert_allclose(found.errors[0], plain, rtol=0.02)
    np.testing.assert_allclose(found.errors[found.candidate], best, rtol=0.02)
    np.testing.assert_allclose(found.errors[1 + ALPHAS.index(0.5)], half, rtol=0.02)
    assert np.asarray(found.scale)[[3, 70]].min() > np.median(found.scale)


def test_weights_alone_need_no_smoothing() -> None:
    x, w = layer(2)
    scheme = Scheme(8, -1)
    ones = search_alpha((jnp.asarray(w),), (scheme,), jnp.abs(jnp.asarray(x)).max(0), jnp.asarray(x))
    plain = np.square(x @ (np.asarray(rtn(jnp.asarray(w), scheme).dequantize()) - w).T).sum()
    np.testing.assert_allclose(ones.errors[0], plain, rtol=1e-3)
