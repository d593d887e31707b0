"""Laws of the sampling strategies: what each keeps, what it leaves as it is, which numbers it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.generate.sampling import (
    Greedy,
    MinP,
    RepetitionPenalty,
    Sample,
    Strategy,
    Temperature,
    TopK,
    TopP,
    make_sampler,
)

ROWS, VOCAB = 3, 50
NOTHING_SEEN = jnp.zeros((ROWS, VOCAB), bool)
STRATEGIES: list[Strategy] = [RepetitionPenalty(1.3), TopK(5), TopP(0.7), MinP(0.1), Temperature(0.6)]


@st.composite
def logits(draw: st.DrawFn) -> jax.Array:
    """float32 [ROWS, VOCAB], no two of a row the same; flat ones and steep ones."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.01, 1.0, 5.0, 30.0]))
    shift = draw(st.sampled_from([-100.0, 0.0, 7.0]))
    values = np.sort(rng.normal(scale=spread, size=(ROWS, VOCAB)) + shift, axis=-1).astype(np.float32)
    # Rounding may have made neighbours equal.
    for i in range(1, VOCAB):
        values[:, i] = np.maximum(values[:, i], np.nextafter(values[:, i - 1], np.float32(np.inf)))
    return jnp.asarray(rng.permuted(values, axis=-1))


def probabilities(x: Any) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def keys(seed: int, rows: int) -> Any:
    return jax.random.split(jax.random.key(seed), rows)


def kept(x: Any) -> np.ndarray:
    return np.asarray(x) > -np.inf


def unchanged(before: Any, after: Any) -> bool:
    """What was kept has the bits it had."""
    mask = kept(after)
    return bool((np.asarray(before)[mask] == np.asarray(after)[mask]).all())


@given(logits(), st.integers(0, 2**32 - 1))
def test_the_top_one_is_greedy(x: jax.Array, seed: int) -> None:
    key = keys(seed, len(x))
    greedy = Greedy()(x, NOTHING_SEEN, key)
    np.testing.assert_array_equal(np.asarray(greedy), np.asarray(x).argmax(axis=-1))
    for alone in (TopK(1), TopP(1e-6), TopP(1e-45), MinP(1.0), Temperature(1e-30), Temperature(5e-324)):
        np.testing.assert_array_equal(np.asarray(Sample((alone,))(x, NOTHING_SEEN, key)), np.asarray(greedy))


@given(logits())
def test_some_numbers_keep_all(x: jax.Array) -> None:
    for strategy in (TopP(1.0), MinP(0.0), MinP(1e-60), TopK(VOCAB), TopK(10**30), RepetitionPenalty(1.0)):
        np.testing.assert_array_equal(np.asarray(strategy(x, ~NOTHING_SEEN)), np.asarray(x))


@given(logits(), st.integers(1, VOCAB))
def test_top_k_keeps_the_k_largest(x: jax.Array, k: int) -> None:
    out = TopK(k)(x, NOTHING_SEEN)
    assert (kept(out).sum(axis=-1) == k).all()
    largest = np.sort(np.asarray(x), axis=-1)[:, -k]
    assert (np.where(kept(out), np.asarray(x), np.inf).min(axis=-1) == largest).all()
    assert unchanged(x, out)


def test_top_k_keeps_what_ties_with_the_last() -> None:
    x = jnp.asarray([[3.0, 2.0, 2.0, 1.0]], jnp.float32)
    np.testing.assert_array_equal(kept(TopK(2)(x, jnp.zeros(x.shape, bool)))[0], [True, True, True, False])


@given(logits(), st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(x: jax.Array, p: float) -> None:
    out = TopP(p)(x, NOTHING_SEEN)
    share, mask = probabilities(x), kept(out)
    mass = np.where(mask, share, 0).sum(axis=-1)
    least = np.where(mask, share, np.inf).min(axis=-1)
    assert (mass >= p - 1e-5).all()
    if p < 1:
        assert ((mass - least < p + 1e-5) | (mask.sum(axis=-1) == 1)).all()
    # None that is left out is more likely than one that is kept.
    assert (np.where(mask, -np.inf, share).max(axis=-1) <= least).all()
    assert unchanged(x, out)


@given(logits(), st.floats(0.001, 1.0))
def test_min_p_keeps_what_is_likely_enough(x: jax.Array, p: float) -> None:
    out = MinP(p)(x, NOTHING_SEEN)
    share = probabilities(x)
    ratio = share / share.max(axis=-1, keepdims=True)
    clear = np.abs(ratio / p - 1) > 1e-4
    np.testing.assert_array_equal(kept(out)[clear], (ratio >= p)[clear])
    assert unchanged(x, out)


@given(logits(), st.floats(0.05, 20.0))
def test_temperature_sharpens_by_a_power(x: jax.Array, temperature: float) -> None:
    got = probabilities(Temperature(temperature)(x, NOTHING_SEEN))
    want = probabilities(np.asarray(x, np.float64) / temperature)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-12)


@given(logits(), st.floats(0.01, 10.0), st.integers(0, 2**32 - 1))
def test_repetition_penalty_touches_seen_tokens_only(x: jax.Array, penalty: float, seed: int) -> None:
    seen = np.random.default_rng(seed).random((ROWS, VOCAB)) < 0.3
    out = np.asarray(RepetitionPenalty(penalty)(x, jnp.asarray(seen)))
    before = np.asarray(x)
    np.testing.assert_array_equal(out[~seen], before[~seen])
    by_hand = np.where(before > 0, before / np.float32(penalty), before * np.float32(penalty))
    np.testing.assert_allclose(out[seen], by_hand[seen], rtol=1e-6)
    if penalty > 1:
        assert (out[seen] <= before[seen]).all()


@given(logits(), st.permutations(STRATEGIES), st.integers(0, 2**32 - 1))
def test_what_is_ruled_out_is_never_drawn(x: jax.Array, strategies: list[Strategy], seed: int) -> None:
    left = x
    for strategy in strategies:
        left = strategy(left, NOTHING_SEEN)
    assert kept(left).any(axis=-1).all()
    assert not np.isnan(np.asarray(left)).any()
    token = np.asarray(Sample(tuple(strategies))(x, NOTHING_SEEN, keys(seed, len(x))))
    assert token.dtype == np.int32
    assert kept(left)[np.arange(ROWS), token].all()


def test_draws_follow_the_probabilities() -> None:
    n, shares = 20_000, np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    x = jnp.tile(jnp.asarray(np.log(shares), jnp.float32)[None], (n, 1))
    tokens = np.asarray(Sample()(x, jnp.zeros(x.shape, bool), keys(3, len(x))))
    found = np.bincount(tokens, minlength=shares.size) / n
    assert (np.abs(found - shares) < 5 * np.sqrt(shares * (1 - shares) / n)).all()


def test_a_key_decides() -> None:
    x = jnp.zeros((ROWS, VOCAB), jnp.float32)
    draws = [np.asarray(Sample()(x, NOTHING_SEEN, keys(seed, len(x)))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_numbers_make_a_chain_in_llama_cpp_s_order() -> None:
    sampler = make_sampler(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    assert sampler == Sample((RepetitionPenalty(1.1), TopK(40), TopP(0.9), MinP(0.05), Temperature(0.7)))
    assert make_sampler(temperature=1.0, top_k=0) == Sample()
    # Greedy: only the penalty can change which token is the most likely.
    assert make_sampler(temperature=0, top_k=40, repetition_penalty=1.1) == Greedy((RepetitionPenalty(1.1),))
    assert hash(sampler) == hash(make_sampler(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1))


NAN, INFINITY = float("nan"), float("inf")
OUT_OF_RANGE = {
    "temperature": [-0.1, NAN, INFINITY],
    "top_k": [-1],
    "top_p": [0.0, -0.5, 1.01, NAN, INFINITY],
    "min_p": [-0.01, 1.01, NAN],
    "repetition_penalty": [0.0, -1.0, NAN, INFINITY, 1e-30],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_numbers_out_of_range_are_refused(name: str, value: float, temperature: float) -> None:
    with pytest.raises(QjaxError, match=rf"expected .*, got {value}"):
        make_sampler(**({"temperature": temperature} | {name: value}))
