"""AWQ on arrays: the search is the reference's formula, and no error that it measures ever grows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import AffineArray, Scheme, parse_scheme
from qjax.quantizers.awq import awq, clipped_grid, range_shares, search_scale
from qjax.quantizers.input_sums import both, input_sums, scaled, squared_error
from qjax.quantizers.rtn import from_codes, grid_of, rtn, to_codes


def layer(seed: int, columns: int = 64, outliers: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [tokens, in] some of whose columns are large, as an LLM's are, and a matrix [48, in]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(5, size=(200, columns)) * rng.lognormal(0, 0.5, columns)
    x[:, rng.choice(columns, outliers, replace=False)] *= 20
    return x.astype(np.float32), rng.normal(size=(48, columns)).astype(np.float32)


def numpy_rtn(w: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Asymmetric, by the formula alone, with float16 scales."""
    g = w.reshape(len(w), -1, group)
    least, most = np.minimum(g.min(-1, keepdims=True), 0), np.maximum(g.max(-1, keepdims=True), 0)
    scale = ((most - least) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    zero = np.clip(np.round(-least / scale), 0, 2**bits - 1)
    return ((np.clip(np.round(g / scale) + zero, 0, 2**bits - 1) - zero) * scale).reshape(w.shape)


def test_search_is_the_reference_s() -> None:
    x, w = layer(0)
    x_mean, group = np.abs(x).mean(0), 32
    g = np.abs(w).reshape(len(w), -1, group)
    w_mean = (g / (g.max(-1, keepdims=True) + 1e-6)).mean(0).reshape(-1)
    scales, losses = [np.ones_like(x_mean)], []
    for i in range(20):
        s = np.maximum(x_mean ** (i / 20) / (w_mean ** (1 - i / 20) + 1e-4), 1e-4)
        scales.append(s / np.sqrt(s.max() * s.min()))
    for s in scales:
        losses.append(np.square(x @ (numpy_rtn((w * s).astype(np.float32), group, 3) / s - w).T).sum())
    m = input_sums(jnp.asarray(x))
    found = search_scale((jnp.asarray(w),), (Scheme(3, group, symmetric=False),), m.absolute / m.tokens, m.second)
    best = int(np.argmin(losses))
    assert int(found.candidate) == best > 0
    np.testing.assert_allclose(found.errors, losses, rtol=2e-3)
    np.testing.assert_allclose(found.scale, scales[best], rtol=1e-4)


@jax.jit
def products_error(array: AffineArray, scale: Any, w: Any, second: Any) -> Any:
    return squared_error(array.dequantize() / scale[None] - w, second)


@pytest.mark.parametrize("text", ["w4g32", "w3g32-asym", "w2g32-asym", "w4", "w4t"])
def test_errors_never_grow(text: str) -> None:
    scheme = parse_scheme(text)
    for seed in range(3):
        x, w = (jnp.asarray(a) for a in layer(seed))
        m = input_sums(x)
        error = lambda array, s, m=m, w=w: float(products_error(array, s, w, m.second))
        plain = error(rtn(w, scheme), jnp.ones(64))
        found = search_scale((w,), (scheme,), m.absolute / m.tokens, m.second)
        scaled_only = error(rtn(w * found.scale[None], scheme), found.scale)
        assert scaled_only <= plain * 1.0001
        # Of a group of its own; where there are several their errors may add up otherwise.
        clipped = error(awq(w * found.scale[None], scaled(m.second, found.scale), scheme), found.scale)
        assert clipped < plain
        if scheme.group_size <= 0:
            assert clipped <= scaled_only * 1.0001


def test_clipping_never_adds_error_within_a_group() -> None:
    x, w = (jnp.asarray(a) for a in layer(5))
    scheme, second = Scheme(3, 32), input_sums(x).second

    def per_group(grid: object) -> np.ndarray:
        error = np.asarray(from_codes(to_codes(w, grid, scheme), grid, scheme) - w).reshape(48, 2, 32)
        parts = np.stack([np.asarray(second)[i : i + 32, i : i + 32] for i in (0, 32)])
        return np.einsum("ogi,gij,ogj->og", error, parts, error)

    plain, clipped = per_group(grid_of(w, scheme)), per_group(clipped_grid(w, second, scheme))
    assert (clipped <= plain * 1.0001).all()
    assert clipped.sum() < 0.95 * plain.sum()
    np.testing.assert_allclose(per_group(clipped_grid(w, second, scheme, (1.0,))), plain, rtol=1e-6)


def test_a_planted_outlier_is_scaled_up() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(300, 128)).astype(np.float32), rng.normal(size=(64, 128)).astype(np.float32)
    x[:, 37] *= 50
    m = input_sums(jnp.asarray(x))
    found = search_scale((jnp.asarray(w),), (Scheme(4, 64),), m.absolute / m.tokens, m.second)
    scale = np.asarray(found.scale)
    assert scale[37] > 1
    assert scale.argmax() == 37
    assert float(found.errors[found.candidate]) < 0.5 * float(found.errors[0])


def test_ties_are_kept_and_silent_columns_left() -> None:
    x, w = layer(2)
    x[:, 5] = 0
    m = input_sums(jnp.asarray(x))
    ties = jnp.tile(jnp.arange(32, dtype=jnp.int32), 2)
    found = search_scale((jnp.asarray(w),), (Scheme(3, 32),), m.absolute / m.tokens, m.second, ties)
    scale = np.asarray(found.scale)
    assert int(found.candidate) > 0
    assert (scale[:32] == scale[32:]).all()
    assert scale[5] == scale[37] == 1
    assert np.isfinite(scale).all()


def test_matrices_of_other_schemes_share_a_scale() -> None:
    x, w = layer(3)
    m = input_sums(jnp.asarray(x))
    ws, schemes = (jnp.asarray(w[:16]), jnp.asarray(w[16:])), (Scheme(3, 32), Scheme(4, -1))
    together = search_scale(ws, schemes, m.absolute / m.tokens, m.second)
    alone = [squared_error(rtn(v, s).dequantize() - v, m.second) for v, s in zip(ws, schemes, strict=True)]
    np.testing.assert_allclose(together.errors[0], sum(map(float, alone)), rtol=1e-5)


def test_moments_are_those_of_all_tokens() -> None:
    x = layer(4)[0]
    m = both(input_sums(jnp.asarray(x[:50])), input_sums(jnp.asarray(x[50:]).reshape(10, 15, -1)))
    np.testing.assert_allclose(m.absolute / m.tokens, np.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(m.most, np.abs(x).max(0))
    np.testing.assert_allclose(m.second, x.T @ x, rtol=1e-4, atol=1e-2)
    d = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    np.testing.assert_allclose(squared_error(jnp.asarray(d), m.second), np.square(x @ d.T).sum(), rtol=1e-4)


def test_ends_of_asymmetric_ranges_move_apart() -> None:
    w = np.random.default_rng(0).uniform(-1, 1, size=(8, 64)).astype(np.float32)
    w[:, 0] = 2.5
    second, scheme = jnp.eye(64), Scheme(3, 64, symmetric=False)
    grid = clipped_grid(jnp.asarray(w), second, scheme)
    low = -np.asarray(grid.scale, np.float32) * np.asarray(grid.zero)
    high = low + 7 * np.asarray(grid.scale, np.float32)
    assert (high < 2.45).all()
    assert high.mean() < 2.3
    assert (low < -0.7).all()


def test_shares_of_ranges() -> None:
    np.testing.assert_allclose(range_shares(), 1.05 - np.arange(22) / 40)
    assert range_shares(20, 0) == (1.05, 1.025)
