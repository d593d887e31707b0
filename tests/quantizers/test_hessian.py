"""Second moments: those of all tokens at once, and the same bits however tokens come."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.quantizers import hessian
from qjax.quantizers.asymmetric import compensated, trusted_share

TOKENS = 2 * hessian.TILE + 77


def tokens(columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(TOKENS, columns)).astype(np.float32)


def in_batches(x: np.ndarray, t: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    moments = hessian.begin(x.shape[1], t.shape[1])
    for part, other in zip(np.split(x, sorted(cuts)), np.split(t, sorted(cuts)), strict=True):
        moments = hessian.add(moments, jnp.asarray(part), jnp.asarray(other))
    H, cross = hessian.finish(moments)
    return np.asarray(H), np.asarray(cross)


X, T = tokens(8), tokens(3, seed=1)
ONCE = in_batches(X, T, [])


@settings(max_examples=6)
@given(st.lists(st.sampled_from([0, 77, hessian.TILE, 2 * hessian.TILE]), max_size=6))  # few lengths to compile for
def test_one_batch_or_many_give_the_same_bits(cuts: list[int]) -> None:
    for once, many in zip(ONCE, in_batches(X, T, cuts), strict=True):
        np.testing.assert_array_equal(many, once)


def test_moments_are_those_of_all_tokens() -> None:
    x, t = X.astype(np.float64), T.astype(np.float64)
    np.testing.assert_allclose(ONCE[0], 2 / TOKENS * x.T @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ONCE[1], 2 / TOKENS * t.T @ x, rtol=1e-5, atol=1e-6)


def test_batches_of_sequences_are_their_tokens() -> None:
    sequences = X[:64].reshape(4, 16, 8)
    a, b = (hessian.finish(hessian.add(hessian.begin(8), jnp.asarray(x)))[0] for x in (sequences, X[:64]))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    x = X.copy()
    x[100, 3] = bad
    with pytest.raises(QjaxError, match=r"blk\.0\.attn_q\.weight: .* not finite"):
        hessian.finish(hessian.add(hessian.begin(8), jnp.asarray(x)), "blk.0.attn_q.weight")


def test_no_tokens_are_refused() -> None:
    with pytest.raises(QjaxError, match="no calibration tokens"):
        hessian.finish(hessian.begin(8))


def test_compensated_weights_are_the_regression_of_what_is_wanted() -> None:
    """On inputs that lack something, the least squares to the products of those that do not."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(512, 8)).astype(np.float32)
    x = true + 0.3 * rng.normal(size=true.shape).astype(np.float32)
    W = rng.normal(size=(5, 8)).astype(np.float32)
    H, cross = hessian.finish(hessian.add(hessian.begin(8, 8), jnp.asarray(x), jnp.asarray(true - x)))
    lack = jnp.asarray(W) @ cross
    best = np.linalg.lstsq(x, true @ W.T, rcond=None)[0].T
    np.testing.assert_allclose(compensated(W, H, lack, jnp.float32(1), damp=0.0), best, atol=1e-3)
    np.testing.assert_array_equal(compensated(W, H, lack, jnp.float32(0)), W)


def test_a_regression_on_few_tokens_is_not_trusted() -> None:
    assert trusted_share(512, 512) == trusted_share(512, 16) == 0
    assert trusted_share(512, 2048) == pytest.approx(0.75)
