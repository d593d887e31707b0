"""High effort: no block's error grows, most shrink, and `gguf.quants` reads what is written."""

from typing import Any

import gguf
import gguf.quants as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.quantizers.ggml import TYPES, block_size, encode
from qjax.quantizers.ggml_high import HIGH

# Without and with importance, on normal numbers: what is surely won.
GAINS = {
    "Q2_K": (0.9, 0.985),
    "Q3_K": (0.95, 1.0),
    "Q4_K": (0.97, 0.98),
    "Q5_K": (0.93, 0.95),
    "Q6_K": (0.93, 0.95),
    "IQ4_XS": (0.97, 0.98),
    "IQ4_NL": (0.97, 0.98),
    "Q4_0": (0.93, 0.98),
    "Q4_1": (0.85, 0.99),
    "Q5_0": (0.93, 0.98),
    "Q5_1": (0.85, 0.98),
    "Q8_0": (0.99, 0.99),
}


# Each is a few programs to compile: these stand for the rest, of the same code.
QUICK = ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in HIGH]


def hard_rows() -> np.ndarray:
    """float32 [16, 512]."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((16, 512))
    w[0] = 0
    w[1, :256] = 0
    w[2], w[3] = 0.3, -1e-3
    w[4] *= 1e4
    w[5] *= 1e-6
    w[6] *= 1e-12
    w[7], w[8] = np.abs(w[7]), -np.abs(w[8])
    w[9] = w[9] * 1e-3 + 5
    w[10, ::37] = 40
    w[11, 5] = -300
    w[12] = np.sign(w[12])
    w[13] *= np.exp(rng.normal(0, 3, 512))
    w[14, 32:] = 0
    return w.astype(np.float32)


def errors(kind: str, blocks: np.ndarray, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """What `encode` says that high effort makes small, of each block."""
    decoded = oracle.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    assert np.isfinite(decoded).all()
    terms = (decoded - w) ** 2 * (1.0 if importance is None else importance)
    squares = w.astype(np.float64).reshape(-1, block_size(kind)) ** 2
    if kind in ("Q2_K", "Q3_K"):
        terms *= np.sqrt(2 * squares.mean(axis=1, keepdims=True) + squares).reshape(w.shape)
    return terms.reshape(squares.shape).sum(axis=1)


def assert_no_larger(kind: str, w: np.ndarray, importance: np.ndarray | None) -> float:
    """The ratio of both efforts' sums."""
    normal, high = (errors(kind, encode(kind, w, importance, effort), w, importance) for effort in ("normal", "high"))
    assert (high <= normal * (1 + 1e-5) + 1e-30).all()
    return float(high.sum() / max(normal.sum(), 1e-30))


def importance_of(rng: np.random.Generator) -> np.ndarray:
    return rng.chisquare(1, 512).astype(np.float32) + np.float32(1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_shrink(kind: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 512)).astype(np.float32) * np.float32(0.03)
    without, with_it = (assert_no_larger(kind, w, i) for i in (None, importance_of(rng)))
    assert without < GAINS[kind][0]
    assert with_it < GAINS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows(kind: str) -> None:
    w = hard_rows()
    for importance in (None, importance_of(np.random.default_rng(1)), np.zeros(512, np.float32)):
        assert_no_larger(kind, w[1:], importance)
        zeros = oracle.dequantize(encode(kind, w[:1], importance, "high"), gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(zeros, 0)


@given(st.integers(0, 2**32 - 1), st.sampled_from(QUICK), st.booleans(), st.integers(-20, 15), st.booleans())
@settings(max_examples=25)
def test_no_block_is_worse(seed: int, kind: str, weighted: bool, power: int, heavy: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (2, 512)) if heavy else rng.standard_normal((2, 512)) + rng.normal()
    w = np.ldexp(w, power).astype(np.float32).clip(-60000, 60000)
    assert_no_larger(kind, w, importance_of(rng) if weighted else None)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_NL"])
def test_rows_do_not_depend_on_each_other(kind: str) -> None:
    w = np.random.default_rng(1).standard_normal((130, 512)).astype(np.float16)
    whole = encode(kind, w, effort="high")
    np.testing.assert_array_equal(whole[[0, 64, 129]], encode(kind, w[[0, 64, 129]], effort="high"))


def test_other_types_and_words() -> None:
    w = hard_rows()[:2]
    for kind in sorted(set(TYPES) - set(HIGH)):
        np.testing.assert_array_equal(encode(kind, w, effort="high"), encode(kind, w))
    # Without the tests' own check of annotations.
    unchecked: Any = getattr(encode, "__wrapped__", encode)
    with pytest.raises(QjaxError, match="effort of normal or high, got 'most'"):
        unchecked("Q4_K", w, effort="most")
