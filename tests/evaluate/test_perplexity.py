"""Perplexity is llama-perplexity's: recomputed in numpy, in the words of its loop (tools/perplexity/perplexity.cpp)."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qjax
from qjax.errors import QjaxError
from qjax.evaluate import perplexity
from qjax.evaluate.perplexity import check_finite, negative_log_likelihood, summarize
from qjax.evaluate.shapes import llama
from qjax.evaluate.synthetic import synthetic_params
from qjax.models import forward

CONFIG = llama(layers=1, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=64)
N_CTX, BOS = 32, 1
# Two whole chunks and a rest that is too short for a third.
LENGTH = 2 * N_CTX + 20


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return synthetic_params(CONFIG, "q4_0")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [BOS, *np.random.default_rng(0).integers(2, CONFIG.vocab, LENGTH - 1).tolist()]


@functools.cache
def whole_forward() -> Any:
    """Logits of every position of a chunk, in one compiled program."""
    return jax.jit(lambda params, tokens: forward(params, CONFIG, tokens)[0])


def llama_perplexity(
    params: dict[str, Any], tokens: Sequence[int], n_ctx: int, n_chunk: int, bos: int | None
) -> tuple[float, float, int]:
    """(PPL, its error, count) by llama.cpp's double sums over the second half of each chunk."""
    nll = nll2 = 0.0
    count, first = 0, n_ctx // 2
    for i in range(n_chunk):
        start = i * n_ctx
        batch = list(tokens[start : start + n_ctx])
        if bos is not None:
            batch[0] = bos
        logits = np.asarray(whole_forward()(params, jnp.asarray([batch], jnp.int32))[0], np.float64)
        for j in range(first, n_ctx - 1):
            shifted = logits[j] - logits[j].max()
            v = math.log(np.exp(shifted).sum()) - shifted[tokens[start + j + 1]]
            nll += v
            nll2 += v * v
            count += 1
    nll, nll2 = nll / count, nll2 / count
    return math.exp(nll), math.sqrt((nll2 - nll * nll) / (count - 1)) * math.exp(nll), count


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("chunks", [None, 1, 5])
def test_is_what_llama_perplexity_computes(
    params: dict[str, Any], ids: list[int], bos: int | None, chunks: int | None
) -> None:
    found = perplexity(params, CONFIG, ids, n_ctx=N_CTX, bos_id=bos, chunks=chunks)
    n_chunk = 1 if chunks == 1 else 2
    ppl, error, count = llama_perplexity(params, ids, N_CTX, n_chunk, bos)
    assert (found.perplexity, found.stderr) == pytest.approx((ppl, error), rel=1e-5)
    assert found.tokens == count == n_chunk * (N_CTX // 2 - 1)
    assert found.chunks == n_chunk
    assert found.seconds > 0


def test_bos_stands_where_each_chunk_begins(params: dict[str, Any], ids: list[int]) -> None:
    """It hides the token there, and nothing else; without one, that token counts."""
    changed = np.asarray(ids)
    changed[N_CTX] = (changed[N_CTX] + 7) % CONFIG.vocab
    kept = changed.copy()
    hidden = [perplexity(params, CONFIG, x, n_ctx=N_CTX, bos_id=BOS).perplexity for x in (ids, changed)]
    assert hidden[0] == hidden[1]
    seen = [perplexity(params, CONFIG, x, n_ctx=N_CTX).perplexity for x in (ids, changed)]
    assert seen[0] != seen[1]
    # The caller's ids are not written to.
    np.testing.assert_array_equal(changed, kept)
    # The text's own BOS is there already.
    first = [perplexity(params, CONFIG, ids, n_ctx=N_CTX, chunks=1, bos_id=b).perplexity for b in (None, BOS)]
    assert first[0] == first[1]


def test_tokens_after_the_last_chunk_do_not_count(params: dict[str, Any], ids: list[int]) -> None:
    whole = perplexity(params, CONFIG, ids, n_ctx=N_CTX)
    assert whole[:-1] == perplexity(params, CONFIG, ids[: 2 * N_CTX], n_ctx=N_CTX)[:-1]


def test_a_model_that_knows_nothing_is_as_good_as_its_vocabulary(params: dict[str, Any], ids: list[int]) -> None:
    uniform = params | {"output": jnp.zeros((CONFIG.vocab, CONFIG.hidden), jnp.float32)}
    found = perplexity(uniform, CONFIG, ids, n_ctx=N_CTX)
    assert found.perplexity == pytest.approx(CONFIG.vocab, rel=1e-6)
    assert found.stderr == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("n_ctx", [8, CONFIG.context])
def test_the_shortest_and_the_longest_chunk(params: dict[str, Any], ids: list[int], n_ctx: int) -> None:
    found = perplexity(params, CONFIG, ids, n_ctx=n_ctx)
    assert found.chunks == LENGTH // n_ctx
    assert found.tokens == found.chunks * (n_ctx // 2 - 1)
    assert math.isfinite(found.perplexity)


def test_progress_tells_the_perplexity_so_far(params: dict[str, Any], ids: list[int]) -> None:
    told: list[tuple[int, int, float]] = []
    found = qjax.perplexity(params, CONFIG, ids, n_ctx=N_CTX, progress=lambda *args: told.append(args))
    assert [entry[:2] for entry in told] == [(1, 2), (2, 2)]
    assert told[0][2] == perplexity(params, CONFIG, ids, n_ctx=N_CTX, chunks=1).perplexity
    assert told[1][2] == pytest.approx(found.perplexity, rel=1e-12)


def test_activations_are_passed_on(params: dict[str, Any], ids: list[int]) -> None:
    plain, rounded = (
        perplexity(params, CONFIG, ids, n_ctx=N_CTX, activations=kind).perplexity for kind in ("float", "int8")
    )
    assert plain != rounded
    assert plain == pytest.approx(rounded, rel=0.05)


@pytest.mark.parametrize("n_ctx", [33, 6, 0, -8, CONFIG.context + 2])
def test_contexts_that_cannot_be(params: dict[str, Any], ids: list[int], n_ctx: int) -> None:
    with pytest.raises(QjaxError, match=f"even context from 8 to the model's 64, got {n_ctx}"):
        perplexity(params, CONFIG, ids, n_ctx=n_ctx)


def test_text_without_a_chunk(params: dict[str, Any], ids: list[int]) -> None:
    for length in (0, N_CTX - 1):
        with pytest.raises(QjaxError, match=f"the text has {length} tokens, .*{N_CTX}: give a longer one"):
            perplexity(params, CONFIG, ids[:length], n_ctx=N_CTX)


@pytest.mark.parametrize("wrong", [CONFIG.vocab, -1, 2**40])
def test_ids_that_the_embedding_lacks(params: dict[str, Any], ids: list[int], wrong: int) -> None:
    words = f"token id {wrong} is not in the model's vocabulary of {CONFIG.vocab}"
    with pytest.raises(QjaxError, match=words):
        perplexity(params, CONFIG, [*ids[:40], wrong, *ids[40:]], n_ctx=N_CTX)
    with pytest.raises(QjaxError, match=words):
        perplexity(params, CONFIG, ids, n_ctx=N_CTX, bos_id=wrong)


@pytest.mark.parametrize("chunks", [0, -1])
def test_no_chunks_asked_for(params: dict[str, Any], ids: list[int], chunks: int) -> None:
    with pytest.raises(QjaxError, match=f"at least one chunk, got {chunks}"):
        perplexity(params, CONFIG, ids, n_ctx=N_CTX, chunks=chunks)


@given(st.lists(st.floats(0.0, 20.0), min_size=2, max_size=50))
def test_error_is_that_of_a_mean(losses: list[float]) -> None:
    """PPL times the standard error of the mean NLL: numpy's deviation with n - 1, over sqrt(n)."""
    values = np.asarray(losses, np.float64)
    found = summarize(values, 1, 0.0)
    assert found.perplexity == pytest.approx(math.exp(values.mean()))
    # Relative to the largest error there could be: a difference of squares loses digits.
    expected = values.std(ddof=1) / math.sqrt(values.size)
    assert found.stderr / found.perplexity == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found.tokens == values.size


def test_one_loss_has_no_error() -> None:
    found = summarize(np.array([math.log(5.0)]), 1, 0.0)
    assert found.perplexity == pytest.approx(5.0)
    assert math.isnan(found.stderr)


def test_what_no_float_holds_is_infinite_and_refused() -> None:
    found = summarize(np.array([800.0, 900.0]), 1, 0.0)
    assert found.perplexity == math.inf
    for figures in ((found.perplexity,), (1.0, math.nan)):
        with pytest.raises(QjaxError, match=r"m\.gguf: the perplexity is no finite number"):
            check_finite("m.gguf", *figures)
    check_finite("m.gguf", 1.0, 2.0)


def test_loss_is_minus_the_log_of_softmax() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (6, 11)).astype(np.float32)
    # Softmax itself would overflow or round to nothing here.
    logits[0], logits[1, 4] = logits[0] + np.float32(1e4), np.float32(-200)
    targets = np.array([0, 4, 10, 3, 3, 7], np.int32)
    wide = logits.astype(np.float64) - logits.max(axis=1, keepdims=True).astype(np.float64)
    expected = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(6), targets]
    found = negative_log_likelihood(jnp.asarray(logits), jnp.asarray(targets))
    # 1e4 has steps of 1e-3 in float32.
    np.testing.assert_allclose(found[0], expected[0], atol=2e-3)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=2e-6)
