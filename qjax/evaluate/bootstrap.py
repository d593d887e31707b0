"""Is one model better than another, or was it the text? A paired bootstrap over the chunks both were scored on.

A text's chunks differ far more from each other than two models do on one chunk, so the chunks are drawn with
replacement and each draw is scored for both. Whole chunks, since tokens within one depend on each other. Source: Efron
and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from qjax.errors import QjaxError

# Numbers that are in memory at a time: 32 MB.
_AT_ONCE = 1 << 22


class Bootstrap(NamedTuple):
    """Of each pair: the mean of its differences, the interval it lies in, the share of resamples with a mean below 0.

    A resample in which both are equal counts half.
    """

    mean: Float64[np.ndarray, " pairs"]
    low: Float64[np.ndarray, " pairs"]
    high: Float64[np.ndarray, " pairs"]
    below: Float64[np.ndarray, " pairs"]


def paired_bootstrap(
    differences: Float64[np.ndarray, "pairs chunks"],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Resample chunks; all pairs see the same draws.

    Args:
      differences: of each chunk, the first of the pair minus the second, in any unit.
      confidence: of the percentile interval.

    Raises:
      QjaxError: fewer than two chunks, or no resample.
    """
    pairs, chunks = differences.shape
    if chunks < 2 or resamples < 1:
        raise QjaxError(f"expected at least 2 chunks and 1 resample, got {chunks} and {resamples}")
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, pairs))
    step = max(1, _AT_ONCE // chunks)
    for start in range(0, resamples, step):
        # How often each chunk was drawn.
        counts = rng.multinomial(chunks, np.full(chunks, 1 / chunks), min(step, resamples - start))
        means[start : start + step] = counts @ differences.T / chunks
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    below = (means < 0).mean(axis=0) + (means == 0).mean(axis=0) / 2
    return Bootstrap(differences.mean(axis=1), low, high, below)
