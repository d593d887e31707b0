"""KL divergence of a model to another one's predictions, as llama-perplexity measures and stores them.

A base file holds the log-probabilities of one model on the chunks of a text, 16 bits for each token of the vocabulary;
other models of that vocabulary are compared with it. Source: llama.cpp's tools/perplexity (--kl-divergence-base).
"""

import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt16

from qjax.errors import FormatError, QjaxError
from qjax.evaluate.perplexity import Perplexity, score, scored, summarize
from qjax.formats.atomic import atomic_file
from qjax.kernels import Activations
from qjax.models import ModelConfig

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")
# Of 16 bits; and what of a distribution counts: log-probabilities further below the largest are stored as this far.
_TOP, _RANGE = np.float32(65535), np.float32(16)

Progress = Callable[[int, int, float], None]


class Base(NamedTuple):
    """What a base file holds; `rows` is a view on the file.

    rows: uint16 [chunks, n_ctx / 2 - 1, width]: scale and least log-probability as two float32, then a number of 16
    bits for each token of the vocabulary.
    """

    path: Path
    vocab: int
    tokens: Int32[np.ndarray, "chunks n_ctx"]
    rows: UInt16[np.ndarray, "chunks n width"]


class Divergence(NamedTuple):
    """Statistics over all scored tokens, in nats; `rms_dp` and `same_top` are shares of 1.

    base_perplexity: of the model that made the base file. rms_dp: of the change in the right token's probability.
    """

    perplexity: Perplexity
    base_perplexity: float
    mean_kld: float
    kld_stderr: float
    median_kld: float
    max_kld: float
    percentiles: dict[str, float]
    rms_dp: float
    same_top: float


def _width(vocab: int) -> int:
    return 2 * ((vocab + 1) // 2) + 4


def read_base(path: str | Path, config: ModelConfig) -> Base:
    """Open a base file for a model of this vocabulary.

    Raises:
      FormatError: it cannot be read, is none, is cut short, or belongs to another vocabulary.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise FormatError(f"{path}: holds no log-probabilities, as --save-kl-base and llama-perplexity write them")
    _, n_ctx, vocab, chunks = _HEADER.unpack(head)
    if vocab != config.vocab:
        raise FormatError(f"{path}: is of a vocabulary of {vocab}, the model's has {config.vocab}")
    if not 8 <= n_ctx <= config.context or n_ctx % 2 or chunks < 1:
        raise FormatError(f"{path}: {chunks} chunks of {n_ctx} tokens: the model takes 8 to {config.context} at a time")
    scored_tokens, width = n_ctx - 1 - n_ctx // 2, _width(vocab)
    start = _HEADER.size + 4 * n_ctx * chunks
    if size < start + 2 * chunks * scored_tokens * width:
        raise FormatError(f"{path}: is cut short: {size} bytes, expected {start + 2 * chunks * scored_tokens * width}")
    tokens = np.fromfile(path, "<i4", n_ctx * chunks, offset=_HEADER.size).reshape(chunks, n_ctx)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise FormatError(f"{path}: a token id is not in the vocabulary of {vocab}")
    rows = np.memmap(path, "<u2", "r", start, (chunks, scored_tokens, width))
    return Base(path, vocab, tokens.astype(np.int32), rows)


@jax.jit
def _packed(logits: Float[Array, "n vocab"]) -> tuple[Float32[Array, "n 2"], UInt16[Array, "n vocab"]]:
    most = logits.max(axis=-1, keepdims=True)
    least = jnp.maximum(logits.min(axis=-1, keepdims=True), most - _RANGE)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scale = (most - least) / _TOP
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, np.float32(1)), np.float32(0))
    steps = jnp.round(jnp.maximum(logits - least, np.float32(0)) * inverse)
    return jnp.concatenate([scale, least - total], axis=-1), jnp.minimum(steps, _TOP).astype(jnp.uint16)


def save_base(
    path: str | Path,
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks n_ctx"],
    *,
    bos_id: int | None,
    activations: Activations = "float",
    progress: Progress | None = None,
) -> Perplexity:
    """Write a model's log-probabilities on `chunks` (`perplexity.chunks_of`), whole or not at all.

    Raises:
      QjaxError: the file cannot be written.
    """
    with atomic_file(path) as file:

        def write(logits: Float[Array, "n vocab"]) -> None:
            head, steps = (np.asarray(part) for part in _packed(logits))
            rows = np.zeros((len(steps), _width(config.vocab)), "<u2")
            rows[:, :4], rows[:, 4 : 4 + config.vocab] = head.astype("<f4").view("<u2"), steps
            file.write(rows.tobytes())

        file.write(_HEADER.pack(_MAGIC, chunks.shape[1], config.vocab, len(chunks)))
        file.write(chunks.astype("<i4").tobytes())
        return score(params, config, chunks, bos_id=bos_id, activations=activations, progress=progress, each=write)


class Compared(NamedTuple):
    """Of each scored token: both negative log-likelihoods, the divergence, and whether the likeliest token is one."""

    loss: Any
    base_loss: Any
    divergence: Any
    same: Any


@jax.jit
def _compare(
    logits: Float[Array, "n vocab"], targets: Int[Array, " n"], head: Float32[Array, "n 2"], steps: UInt16[Array, "n v"]
) -> Compared:
    own = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    base = head[:, :1] * steps.astype(jnp.float32) + head[:, 1:]
    terms = jnp.where(base > -_RANGE, jnp.exp(base) * (base - own), np.float32(0))
    chosen = lambda x: -jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0]
    same = jnp.argmax(own, axis=-1) == jnp.argmax(base, axis=-1)
    return Compared(chosen(own), chosen(base), jnp.sum(terms, axis=-1), same)


def compare(
    params: dict[str, Any],
    config: ModelConfig,
    base: Base,
    *,
    bos_id: int | None,
    chunks: int | None = None,
    activations: Activations = "float",
    progress: Progress | None = None,
) -> Compared:
    """What `divergence` sums up, token by token: float64 [chunks, n_ctx / 2 - 1] each; its arguments and errors."""
    count = len(base.tokens) if chunks is None else min(chunks, len(base.tokens))
    if count < 1:
        raise QjaxError(f"expected at least one chunk, got {chunks}")
    found: list[Compared] = []
    looked = scored(params, config, base.tokens[:count], bos_id=bos_id, activations=activations)
    for i, (logits, targets) in enumerate(looked):
        rows = np.ascontiguousarray(base.rows[i])
        head = np.ascontiguousarray(rows[:, :4]).view("<f4")
        one = _compare(logits, targets, jnp.asarray(head), jnp.asarray(rows[:, 4 : 4 + base.vocab]))
        found.append(Compared(*(np.asarray(part, np.float64) for part in one)))
        if progress is not None:
            progress(i + 1, count, float(np.concatenate([part.divergence for part in found]).mean()))
    return Compared(*(np.stack(parts) for parts in zip(*found, strict=True)))


def divergence(
    params: dict[str, Any],
    config: ModelConfig,
    base: Base,
    *,
    bos_id: int | None,
    chunks: int | None = None,
    activations: Activations = "float",
    progress: Progress | None = None,
) -> Divergence:
    """A model's perplexity on the base file's text, and how far its predictions are from the base's.

    Args:
      chunks: only this many; None for all.
      progress: called as (chunks done, chunks, mean divergence so far).

    Raises:
      QjaxError: no chunk is asked for.
    """
    start = time.perf_counter()
    found = compare(params, config, base, bos_id=bos_id, chunks=chunks, activations=activations, progress=progress)
    loss, base_loss, kld, same = (part.reshape(-1) for part in found)
    seconds = time.perf_counter() - start
    change = np.exp(-loss) - np.exp(-base_loss)
    return Divergence(
        perplexity=summarize(loss, len(found.loss), seconds),
        base_perplexity=math.exp(float(base_loss.mean())),
        mean_kld=float(kld.mean()),
        kld_stderr=float(kld.std() / math.sqrt(max(kld.size - 1, 1))),
        median_kld=float(np.median(kld)),
        max_kld=float(kld.max()),
        percentiles={f"{p:g}": float(np.percentile(kld, p)) for p in (0.1, 1, 5, 10, 90, 95, 99, 99.9)},
        rms_dp=float(np.sqrt((change**2).mean())),
        same_top=float(same.mean()),
    )
