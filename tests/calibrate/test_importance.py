"""Importances against llama-imatrix, and that neither a pause nor the batch changes them.

The files are of llama-imatrix (of llama-cpp-python 0.3.36), on the embedded model as F32: llama.cpp rounds what F16
weights are multiplied with to F16, and of quantized ones to int8.

    llama-imatrix -m f32.gguf -f LICENSE -c 128 -b 128 -ub 128 --chunks 6 -fa off -ctk f32 -ctv f32 -o imatrix.gguf

f32.gguf is made by `qjax convert embedded f32.gguf --type f32`; for imatrix-q4_0.gguf by `llama-quantize --pure
embedded.gguf q4_0.gguf q4_0` and `llama-quantize --allow-requantize q4_0.gguf f32.gguf f32`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.arrays import QuantizedArray
from qjax.calibrate import importance
from qjax.calibrate.importance import accumulate, nothing
from qjax.errors import QjaxError
from qjax.formats.gguf.imatrix import Importances, read_imatrix
from qjax.models.load import MATRICES

FOLDER = Path(__file__).parent


def apart(found: Importances, want: Importances) -> float:
    """The largest relative difference of a sum."""
    assert found.sums.keys() == want.sums.keys()
    return max(float(np.max(np.abs(found.sums[name] / want.sums[name] - 1))) for name in want.sums)


@pytest.fixture(scope="module")
def found(model: Any, chunks: np.ndarray) -> Importances:
    return importance(model.params, model.config, chunks)


def test_is_what_llama_imatrix_finds(found: Importances) -> None:
    want = read_imatrix(FOLDER / "imatrix.gguf")
    assert (found.chunks, found.chunk_size) == (want.chunks, want.chunk_size) == (6, 128)
    for name, count in want.counts.items():
        assert found.counts[name] == count == 6 * 128
    assert apart(found, want) < 1e-4


def test_a_pause_changes_no_bit(model: Any, chunks: np.ndarray, found: Importances) -> None:
    states = list(accumulate(model.params, model.config, chunks, nothing(128)))
    assert [state.chunks for state in states] == [1, 2, 3, 4, 5, 6]
    [*_, resumed] = accumulate(model.params, model.config, chunks, states[2])
    for name, sums in found.sums.items():
        np.testing.assert_array_equal(states[-1].sums[name], sums)
        np.testing.assert_array_equal(resumed.sums[name], sums)
        # What was given before was left alone.
        assert (states[0].sums[name] < states[1].sums[name]).any()
    assert list(accumulate(model.params, model.config, chunks, resumed)) == []


def test_a_batch_counts_as_its_chunks(model: Any, chunks: np.ndarray, found: Importances) -> None:
    told: list[tuple[int, int]] = []
    batched = importance(
        model.params, model.config, chunks, batch=4, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(4, 6), (6, 6)]
    assert batched.counts == found.counts
    assert apart(batched, found) < 1e-5


def test_of_packed_weights(chunks: np.ndarray) -> None:
    packed = qjax.load("embedded", quantize="q4_0")
    assert all(isinstance(p[name], QuantizedArray) for p in packed.params["layers"] for name in MATRICES)
    found = importance(packed.params, packed.config, chunks)
    assert apart(found, read_imatrix(FOLDER / "imatrix-q4_0.gguf")) < 1e-4


def test_the_output_matrix(model: Any, chunks: np.ndarray, found: Importances) -> None:
    """Its input is what makes the logits; tied embeddings are named as the file names them."""
    short = chunks[:1]
    tied = importance(model.params, model.config, short, output=True)
    assert tied.sums.keys() - found.sums.keys() == {"token_embd.weight"}
    # With the identity in its place, forward gives the output's input.
    identity = jnp.eye(model.config.hidden, dtype=jnp.float32)
    logits, _ = qjax.forward({**model.params, "output": identity}, model.config, jnp.asarray(short))
    want = np.square(np.asarray(logits, np.float64)).sum(axis=(0, 1))
    np.testing.assert_allclose(tied.sums["token_embd.weight"], want, rtol=1e-5)
    untied = importance({**model.params, "output": identity}, model.config, short, output=True)
    np.testing.assert_array_equal(untied.sums["output.weight"], tied.sums["token_embd.weight"])


def test_refuses(model: Any, chunks: np.ndarray) -> None:
    with pytest.raises(QjaxError, match="at least one chunk"):
        importance(model.params, model.config, chunks[:0])
    layers = list(model.params["layers"])
    layers[1] = {**layers[1], "attn_norm": layers[1]["attn_norm"].at[3].set(jnp.inf)}
    damaged = dataclasses.replace(model, params={**model.params, "layers": layers})
    with pytest.raises(QjaxError, match=r"blk\.1\.attn_q\.weight.*not finite"):
        importance(damaged.params, model.config, chunks[:1])
