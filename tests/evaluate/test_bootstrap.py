"""The paired bootstrap against scipy's, against what is known of a mean, and its laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from qjax.errors import QjaxError
from qjax.evaluate import bootstrap
from qjax.evaluate.bootstrap import paired_bootstrap

DIFFERENCES = arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(2, 12)), elements=st.floats(-8, 8, allow_subnormal=False)
)


def test_is_scipy_s() -> None:
    """Percentile intervals of the mean, up to the noise of 20000 resamples."""
    differences = np.random.default_rng(3).normal([[0.3], [-0.05], [0.0]], 1.0, (3, 40))
    found = paired_bootstrap(differences, resamples=20_000, confidence=0.9)
    for i, row in enumerate(differences):
        theirs = stats.bootstrap(
            (row,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
        )
        noise = 0.05 * row.std() / math.sqrt(40)
        assert found.mean[i] == pytest.approx(row.mean())
        assert found.low[i] == pytest.approx(theirs.confidence_interval.low, abs=noise)
        assert found.high[i] == pytest.approx(theirs.confidence_interval.high, abs=noise)
        assert found.below[i] == pytest.approx((theirs.bootstrap_distribution < 0).mean(), abs=0.02)


def test_two_chunks_can_be_counted() -> None:
    """Of {-1, 3} the resamples' means are -1, 1 and 3, a quarter, a half and a quarter of them."""
    found = paired_bootstrap(np.array([[-1.0, 3.0]]), resamples=40_000)
    assert (found.mean[0], found.low[0], found.high[0]) == (1.0, -1.0, 3.0)
    assert found.below[0] == pytest.approx(0.25, abs=0.01)
    # At this confidence the interval ends within the half.
    assert paired_bootstrap(np.array([[-1.0, 3.0]]), confidence=0.4)[1:3] == (1.0, 1.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 400 texts of 60 chunks with a true difference of 0.2, near 95 % of the intervals do."""
    differences = np.random.default_rng(0).normal(0.2, 1.0, (400, 60))
    found = paired_bootstrap(differences, resamples=2000)
    held = ((found.low <= 0.2) & (found.high >= 0.2)).mean()
    assert 0.91 <= held <= 0.98


@given(DIFFERENCES)
def test_laws(differences: np.ndarray) -> None:
    found = paired_bootstrap(differences, resamples=200)
    slack = 1e-12
    assert (differences.min(axis=1) - slack <= found.low).all()
    assert (found.low <= found.high).all()
    assert (found.high <= differences.max(axis=1) + slack).all()
    assert ((found.below >= 0) & (found.below <= 1)).all()
    # A pair seen from the other side; and each pair as if it were alone.
    other = paired_bootstrap(-differences, resamples=200)
    np.testing.assert_allclose(other.low, -found.high, atol=slack)
    np.testing.assert_allclose(other.below, 1 - found.below, atol=slack)
    alone = paired_bootstrap(differences[:1], resamples=200)
    np.testing.assert_allclose(alone.low, found.low[:1], atol=slack)


def test_equal_models_are_better_half_of_the_time() -> None:
    found = paired_bootstrap(np.zeros((1, 9)), resamples=50)
    assert tuple(float(part[0]) for part in found) == (0.0, 0.0, 0.0, 0.5)


def test_one_that_is_always_better() -> None:
    found = paired_bootstrap(np.array([[-0.1, -0.2, -0.3]]), resamples=500)
    assert found.below[0] == 1
    assert found.high[0] < 0


def test_a_seed_repeats_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal(size=(2, 30))
    one, other = (paired_bootstrap(differences, resamples=500, seed=seed) for seed in (1, 2))
    assert not np.array_equal(one.low, other.low)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 70)
    in_pieces = paired_bootstrap(differences, resamples=500, seed=1)
    for a, b in zip(one, in_pieces, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize(("chunks", "resamples"), [(1, 10), (0, 10), (5, 0)])
def test_refuses(chunks: int, resamples: int) -> None:
    with pytest.raises(QjaxError, match=f"at least 2 chunks and 1 resample, got {chunks} and {resamples}"):
        paired_bootstrap(np.zeros((1, chunks)), resamples=resamples)
