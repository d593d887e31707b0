"""Perplexity as llama-perplexity measures it, so that figures of both can be compared.

The text is cut into chunks of n_ctx tokens that do not overlap; the first token of each is replaced by BOS where the
model adds one; only the predictions of the second half are scored, n_ctx / 2 - 1 of them: the first half gives every
scored token a context. PPL = exp(mean NLL), its standard error PPL * sqrt(var / (n - 1)).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

from qjax.errors import QjaxError
from qjax.kernels import Activations
from qjax.models import CacheKind, ModelConfig, forward, init_cache
from qjax.models.chunks import begun, chunks_of


class Perplexity(NamedTuple):
    """perplexity +- stderr over `tokens` scored predictions in `chunks` chunks."""

    perplexity: float
    stderr: float
    tokens: int
    chunks: int
    seconds: float


@jax.jit
def negative_log_likelihood(logits: Float[Array, "n vocab"], targets: Int[Array, " n"]) -> Float[Array, " n"]:
    """-log p(target) of each row, in nats."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def exp(mean: float) -> float:
    """Perplexity of a mean NLL; infinity where no float is large enough."""
    return math.inf if mean > 709 else math.exp(mean)


def check_finite(source: object, *figures: float) -> None:
    """QjaxError naming the model's `source` if one of its figures is no finite number."""
    if not all(map(math.isfinite, figures)):
        raise QjaxError(f"{source}: the perplexity is no finite number: the file's weights are damaged")


def summarize(losses: np.ndarray, chunks: int, seconds: float) -> Perplexity:
    """Perplexity and its error from the NLL of each scored token, float64."""
    count = losses.size
    mean = float(losses.mean())
    variance = float((losses**2).mean()) - mean**2
    ppl = exp(mean)
    error = ppl * math.sqrt(max(variance, 0.0) / (count - 1)) if count > 1 else math.nan
    return Perplexity(ppl, error, count, chunks, seconds)


def perplexity(
    params: dict[str, Any],
    config: ModelConfig,
    ids: Sequence[int] | np.ndarray,
    *,
    n_ctx: int = 512,
    bos_id: int | None = None,
    chunks: int | None = None,
    activations: Activations = "float",
    kv_cache: CacheKind = "float",
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on a text of token ids.

    Args:
      ids: the whole text, tokenized at once, with BOS in front where the model adds one.
      n_ctx: tokens of a chunk, at least 8 and even.
      bos_id: replaces each chunk's first token; None where the model adds no BOS.
      chunks: only this many; None for all.
      kv_cache: "int8" for keys and values as such a cache holds them; else they are float32.
      progress: called as (chunks done, chunks, perplexity so far).

    Raises:
      QjaxError: the text is shorter than one chunk, n_ctx is odd or out of range, or an id is not in the vocabulary.
    """
    cut = chunks_of(config, ids, n_ctx=n_ctx, bos_id=bos_id, chunks=chunks)
    start = time.perf_counter()
    losses = token_losses(
        params, config, cut, bos_id=bos_id, activations=activations, kv_cache=kv_cache, progress=progress
    )
    return summarize(losses, len(cut), time.perf_counter() - start)


def token_losses(
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks n_ctx"],
    *,
    bos_id: int | None,
    activations: Activations,
    kv_cache: CacheKind = "float",
    progress: Callable[[int, int, float], None] | None,
    each: Callable[[Float[Array, "n vocab"]], None] = lambda logits: None,
) -> Float64[np.ndarray, "chunks n"]:
    """NLL of each scored token of chunks that are cut already; `each` is given every chunk's logits."""
    losses = np.empty((len(chunks), scored_tokens(chunks.shape[1])), np.float64)
    total = 0.0
    looked = scored(params, config, chunks, bos_id=bos_id, activations=activations, kv_cache=kv_cache)
    for i, (logits, targets) in enumerate(looked):
        each(logits)
        losses[i] = negative_log_likelihood(logits, targets)
        total += float(losses[i].mean())
        if progress is not None:
            progress(i + 1, len(chunks), exp(total / (i + 1)))
    return losses


def scored_tokens(n_ctx: int) -> int:
    """Predictions of a chunk that count."""
    return n_ctx - 1 - n_ctx // 2


def scored(
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks n_ctx"],
    *,
    bos_id: int | None,
    activations: Activations,
    kv_cache: CacheKind = "float",
) -> Iterator[tuple[Float[Array, "n vocab"], Int[Array, " n"]]]:
    """Of each chunk the logits of the predictions that count, n_ctx / 2 - 1, and the tokens that followed."""
    n_ctx = chunks.shape[1]
    first = n_ctx // 2
    at = jnp.arange(first, n_ctx - 1, dtype=jnp.int32)[None]
    for chunk, shown in zip(chunks, begun(chunks, bos_id), strict=True):
        cache = init_cache(config, 1, n_ctx, jnp.int8) if kv_cache == "int8" else None
        logits, _ = forward(params, config, jnp.asarray(shown)[None], cache, logits_at=at, activations=activations)
        yield logits[0], jnp.asarray(chunk[first + 1 :])
