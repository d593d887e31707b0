"""Rounding to nearest: within half a step of every weight that the grid holds, in as many bytes as promised."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.arrays import AffineArray, Scheme
from qjax.arrays.scheme import BITS
from qjax.quantizers.rtn import Grid, from_codes, grid_of, rtn, to_codes


@partial(jax.jit, static_argnames=("scheme", "mse"))
def rounded(w: Any, scheme: Scheme, mse: bool = False) -> tuple[AffineArray, Any]:
    array = rtn(w, scheme, mse=mse)
    return array, array.dequantize()


# Every width with both kinds of grids and, between them, every kind of group: a program each.
SCHEMES = [
    Scheme(bits, (-1, 0, 32, 64)[(i + 2 * symmetric) % 4], symmetric)
    for i, bits in enumerate(BITS)
    for symmetric in (True, False)
]


@given(st.sampled_from(SCHEMES), st.integers(0, 2**32 - 1))
def test_weights_are_within_half_a_step(scheme: Scheme, seed: int) -> None:
    w = np.random.default_rng(seed).normal(size=(2, 6, 64)).astype(np.float32)
    array, floats = rounded(w, scheme)
    assert array.shape == w.shape
    assert array.scale.shape[-1] == scheme.groups(64)
    step = np.repeat(np.asarray(array.scale, np.float32), 64 // array.scale.shape[-1], axis=-1)
    # The largest of a symmetric group is half a step past the last code; float16 scales and zero points round too.
    most = 0.5 + 2**scheme.bits * 6e-4 if scheme.symmetric else 1.002
    assert (np.abs(np.asarray(floats) - w) <= step * most).all()


@pytest.mark.parametrize(("bits", "group"), [(8, -1), (3, -1), (4, 32), (4, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_a_true_division(bits: int, group: int, symmetric: bool) -> None:
    """At the boundaries between codes too, where a multiplication by the scale's inverse falls on either side."""
    scheme, rng = Scheme(bits, group, symmetric), np.random.default_rng(0)
    halves = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (64, 256)).astype(np.float32) + np.float32(0.5)
    shape = (64, scheme.groups(256))
    scale = np.broadcast_to(rng.uniform(0.001, 0.1, (1, 1) if group == 0 else shape).astype(np.float16), shape)
    zero = None if symmetric else rng.integers(0, 1 << bits, shape).astype(np.uint8)
    spread = lambda leaf: np.repeat(leaf, 256 // leaf.shape[1], axis=1).astype(np.float32)
    middle = np.float32(scheme.middle) if zero is None else spread(zero)
    ties = halves * spread(scale)
    for w in (ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))):
        expected = np.clip(np.rint(w / spread(scale)) + middle, 0, scheme.max_code).astype(np.uint8)
        found = jax.jit(to_codes, static_argnums=2)(jnp.asarray(w), Grid(scale, zero), scheme)
        np.testing.assert_array_equal(found, expected)


def test_int8_and_int4_are_as_small_as_promised() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32))
    assert 2 * w.size / rtn(w, Scheme(8, -1)).nbytes >= 1.85
    assert 2 * w.size / rtn(w, Scheme(4, 128)).nbytes >= 3.5


@pytest.mark.parametrize("group", [-1, 0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_grids_lower_the_squared_error(group: int, symmetric: bool) -> None:
    """Of every group: the grid that holds all weights is among those tried."""
    scheme = Scheme(3, group, symmetric)
    w = np.random.default_rng(1).normal(size=(2, 6, 64)).astype(np.float32)

    def errors(mse: bool) -> np.ndarray:
        square = np.square(np.asarray(rounded(w, scheme, mse)[1]) - w)
        axes = (1, 2, 3) if group == 0 else (3,)
        return square.reshape(2, 6, scheme.groups(64), -1).sum(axes)

    plain, searched = errors(False), errors(True)
    assert (searched <= plain).all()
    assert searched.sum() < 0.9 * plain.sum()


def test_searched_grids_weigh_columns() -> None:
    """A column that counts for more than the rest is the nearer for it."""
    w = jnp.asarray(np.random.default_rng(2).normal(size=(200, 32)).astype(np.float32))
    scheme, heavy = Scheme(2, 32), jnp.ones(32, jnp.float32).at[5].set(1000)

    def error(importance: Any) -> float:
        grid = grid_of(w, scheme, mse=True, importance=importance)
        return float(jnp.square(from_codes(to_codes(w, grid, scheme), grid, scheme) - w)[:, 5].mean())

    assert error(heavy) < 0.5 * error(None)
