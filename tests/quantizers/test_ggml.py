"""K-quants, and all types by importance, against blocks that ggml's own encoders made (ggml_blocks.npz)."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import gguf.quants as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.quantizers.ggml import SEARCHED, TYPES, block_size, encode


def golden_module() -> Any:
    path = Path(__file__).with_name("make_goldens.py")
    spec = importlib.util.spec_from_file_location("make_goldens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = golden_module()
W, IMPORTANCE = made.samples()
with np.load(made.GOLDENS) as held:
    GOLDENS = dict(held)


def floats(kind: str, blocks: np.ndarray) -> np.ndarray:
    return oracle.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def errors(kind: str, blocks: np.ndarray, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Weighted squared error of each block."""
    weights = 1.0 if importance is None else importance.astype(np.float64)
    return (weights * (floats(kind, blocks).astype(np.float64) - w) ** 2).reshape(-1, block_size(kind)).sum(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", made.TYPES)
def test_blocks_are_those_of_ggml(kind: str, weighted: bool) -> None:
    """The same bytes but where two candidates are as good as equal: then the error is as good too."""
    importance = IMPORTANCE if weighted else None
    ours, theirs = encode(kind, W, importance), GOLDENS[f"{kind} weighted" if weighted else kind]
    nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    same = (ours.reshape(-1, nbytes) == theirs.reshape(-1, nbytes)).all(1)
    # Among the last rows are some made to be hard.
    easy = slice(0, 2 * same.size // 3)
    assert same[easy].mean() >= 0.9
    assert same.mean() >= 0.8
    mine, other = (errors(kind, blocks, W, importance) for blocks in (ours, theirs))
    assert mine[easy].sum() <= 1.01 * other[easy].sum()
    assert mine.sum() <= 1.03 * other.sum()


def test_importance_lowers_the_weighted_error() -> None:
    for kind in ("Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        with_it, without = (errors(kind, encode(kind, W[:16], i), W[:16], IMPORTANCE).sum() for i in (IMPORTANCE, None))
        assert with_it < without


@pytest.mark.parametrize("kind", TYPES)
def test_pieces_and_shapes(kind: str) -> None:
    """Rows do not depend on what is encoded with them; axes in front are kept; 16-bit floats are taken as they are."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((130, 4096)).astype(np.float16)
    whole = encode(kind, w)
    np.testing.assert_array_equal(whole[[0, 64, 129]], encode(kind, w[[0, 64, 129]]))
    np.testing.assert_array_equal(encode(kind, w.reshape(2, 65, 4096)), whole.reshape(2, 65, -1))
    np.testing.assert_array_equal(encode(kind, w[3].astype(np.float32)), whole[3])


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SEARCHED)), st.booleans(), st.integers(-40, 30))
@settings(max_examples=25)
def test_any_block_stays_near(seed: int, kind: str, weighted: bool, power: int) -> None:
    """No block is farther off than its step allows, whatever its size; zeros stay zeros."""
    rng = np.random.default_rng(seed)
    w = np.ldexp(rng.standard_normal((2, 256)), power).astype(np.float32).clip(-60000, 60000)
    w[1] = 0
    importance = rng.uniform(0.1, 1, 256).astype(np.float32) if weighted else None
    back = floats(kind, encode(kind, w, importance))
    assert np.isfinite(back).all()
    assert (back[1] == 0).all()
    # Below, float16 scales have no bits left.
    if power > -8:
        levels = {"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63, "IQ4_NL": 15, "IQ4_XS": 15}[kind]
        assert np.abs(back[0] - w[0]).max() <= 2.5 * np.abs(w[0]).max() / levels


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0"])
def test_experts_by_their_own_importance(kind: str) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((3, 4, 256)).astype(np.float16)
    importance = rng.uniform(0.1, 4, (3, 256)).astype(np.float32)
    made = encode(kind, w, importance)
    for expert in range(3):
        np.testing.assert_array_equal(made[expert], encode(kind, w[expert], importance[expert]))
    assert encode(kind, w).shape == made.shape


def test_refuses() -> None:
    w = np.zeros((2, 256), np.float32)
    for call, words in (
        (lambda: encode("Q9_K", w), "one of F16"),
        (lambda: encode("Q4_K", w[:, :128]), "multiple of 256"),
        (lambda: encode("Q4_0", w, -np.ones(256, np.float32)), "not negative"),
        (lambda: encode("Q4_K", w, np.full(256, np.nan, np.float32)), "finite"),
        (lambda: encode("Q4_K", w[None], np.ones((2, 256), np.float32)), "of each column"),
        (lambda: encode("Q4_K", w, np.ones((1, 256), np.float32)), "of each column"),
    ):
        with pytest.raises(QjaxError, match=words):
            call()
