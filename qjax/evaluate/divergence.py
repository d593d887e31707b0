"""KL divergence of a model to another one's predictions, as llama-perplexity measures and stores them.

A base file holds the log-probabilities of one model on the chunks of a text, 16 bits for each token of the vocabulary;
other models of that vocabulary are compared with it. Source: llama.cpp's tools/perplexity (--kl-divergence-base).
"""

import math
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int32, UInt16

from qjax.errors import FormatError, QjaxError
from qjax.evaluate.perplexity import Perplexity, exp, scored, scored_tokens, summarize, token_losses
from qjax.formats.atomic import atomic_file
from qjax.kernels import Activations
from qjax.models import CacheKind, ModelConfig

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")
# Of 16 bits; and what of a distribution counts: log-probabilities further below the largest are stored as this far.
_TOP, _RANGE = np.float32(65535), np.float32(16)
PERCENTILES = (0.1, 1, 5, 10, 90, 95, 99, 99.9)

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


class Scores(NamedTuple):
    """Of each scored token: both negative log-likelihoods and the divergence, in nats; is the likeliest token one?"""

    loss: Float64[np.ndarray, "chunks n"]
    base_loss: Float64[np.ndarray, "chunks n"]
    kld: Float64[np.ndarray, "chunks n"]
    same: Bool[np.ndarray, "chunks n"]


class Divergence(NamedTuple):
    """Statistics over all scored tokens, in nats; `rms_dp` and `same_top` are shares of 1.

    base_perplexity: of the model that made the base file. perplexity_ratio: to it; its error is small, since both
    models find the same tokens hard. rms_dp: of the change in the right token's probability.
    """

    perplexity: Perplexity
    base_perplexity: float
    perplexity_ratio: float
    ratio_stderr: float
    mean_kld: float
    kld_stderr: float
    median_kld: float
    max_kld: float
    percentiles: dict[str, float]
    rms_dp: float
    same_top: float


def _width(vocab: int) -> int:
    return 2 * ((vocab + 1) // 2) + 4


def base_nbytes(chunks: int, n_ctx: int, vocab: int) -> int:
    """Size of a base file."""
    return _HEADER.size + chunks * (4 * n_ctx + 2 * scored_tokens(n_ctx) * _width(vocab))


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
    if size < base_nbytes(chunks, n_ctx, vocab):
        raise FormatError(f"{path}: is cut short: {size} bytes, expected {base_nbytes(chunks, n_ctx, vocab)}")
    tokens = np.fromfile(path, "<i4", n_ctx * chunks, offset=_HEADER.size).reshape(chunks, n_ctx)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise FormatError(f"{path}: a token id is not in the vocabulary of {vocab}")
    start = _HEADER.size + 4 * n_ctx * chunks
    rows = np.memmap(path, "<u2", "r", start, (chunks, scored_tokens(n_ctx), _width(vocab)))
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


def _check_room(path: Path, nbytes: int) -> None:
    """Before hours of work; a folder that is not there is `atomic_file`'s to refuse."""
    if path.parent.is_dir() and (free := shutil.disk_usage(path.parent).free) < nbytes:
        raise QjaxError(
            f"{path}: {nbytes / 1e9:.1f} GB of log-probabilities, the disk has {free / 1e9:.1f} GB free: "
            "take fewer chunks, or another disk"
        )


def check_text(base: Base, ids: Sequence[int]) -> None:
    """QjaxError unless the base file is of the text with these token ids."""
    if not np.array_equal(base.tokens.ravel(), np.asarray(ids[: base.tokens.size], np.int32)):
        raise QjaxError(f"{base.path}: was made of another text, or with another tokenizer")


def save_base(
    path: str | Path,
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks n_ctx"],
    *,
    bos_id: int | None,
    activations: Activations = "float",
    kv_cache: CacheKind = "float",
    progress: Progress | None = None,
) -> Float64[np.ndarray, "chunks n"]:
    """Write a model's log-probabilities on `chunks` (`models.chunks.chunks_of`), whole or not at all.

    Returns:
      Its negative log-likelihood of each scored token in nats; the file holds none above 16 and a bit.

    Raises:
      QjaxError: the file cannot be written, or the disk has no room for it.
    """
    _check_room(Path(path), base_nbytes(len(chunks), chunks.shape[1], config.vocab))
    with atomic_file(path) as file:

        def write(logits: Float[Array, "n vocab"]) -> None:
            head, steps = (np.asarray(part) for part in _packed(logits))
            rows = np.zeros((len(steps), _width(config.vocab)), "<u2")
            rows[:, :4], rows[:, 4 : 4 + config.vocab] = head.astype("<f4").view("<u2"), steps
            file.write(rows.tobytes())

        file.write(_HEADER.pack(_MAGIC, chunks.shape[1], config.vocab, len(chunks)))
        file.write(chunks.astype("<i4").tobytes())
        return token_losses(
            params,
            config,
            chunks,
            bos_id=bos_id,
            activations=activations,
            kv_cache=kv_cache,
            progress=progress,
            each=write,
        )


@jax.jit
def _compare(
    logits: Float[Array, "n vocab"], targets: Int[Array, " n"], head: Float32[Array, "n 2"], steps: UInt16[Array, "n v"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"], Bool[Array, " n"]]:
    """What `Scores` has, of one chunk."""
    own = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    base = head[:, :1] * steps.astype(jnp.float32) + head[:, 1:]
    terms = jnp.where(base > -_RANGE, jnp.exp(base) * (base - own), np.float32(0))
    chosen = lambda x: -jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0]
    same = jnp.argmax(own, axis=-1) == jnp.argmax(base, axis=-1)
    return chosen(own), chosen(base), jnp.sum(terms, axis=-1), same


def divergence(
    params: dict[str, Any],
    config: ModelConfig,
    base: Base,
    *,
    bos_id: int | None,
    chunks: int | None = None,
    activations: Activations = "float",
    kv_cache: CacheKind = "float",
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
    scores = score_against(
        params,
        config,
        base,
        bos_id=bos_id,
        chunks=chunks,
        activations=activations,
        kv_cache=kv_cache,
        progress=progress,
    )
    return statistics(scores, time.perf_counter() - start)


def score_against(
    params: dict[str, Any],
    config: ModelConfig,
    base: Base,
    *,
    bos_id: int | None,
    chunks: int | None,
    activations: Activations,
    kv_cache: CacheKind = "float",
    progress: Progress | None,
) -> Scores:
    """What `divergence` gives the statistics of, token by token."""
    count = len(base.tokens) if chunks is None else min(chunks, len(base.tokens))
    if count < 1:
        raise QjaxError(f"expected at least one chunk, got {chunks}")
    shape = (count, scored_tokens(base.tokens.shape[1]))
    scores = Scores(np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape, np.bool_))
    total = 0.0
    looked = scored(params, config, base.tokens[:count], bos_id=bos_id, activations=activations, kv_cache=kv_cache)
    for i, (logits, targets) in enumerate(looked):
        rows = np.ascontiguousarray(base.rows[i])
        head = np.ascontiguousarray(rows[:, :4]).view("<f4")
        found = _compare(logits, targets, jnp.asarray(head), jnp.asarray(rows[:, 4 : 4 + base.vocab]))
        for values, chunk in zip(scores, found, strict=True):
            values[i] = chunk
        total += float(scores.kld[i].mean())
        if progress is not None:
            progress(i + 1, count, total / (i + 1))
    return scores


def statistics(scores: Scores, seconds: float) -> Divergence:
    """The figures that llama-perplexity gives of such scores, and by its formulas."""
    loss, base_loss, kld, same = scores
    change = np.exp(-loss) - np.exp(-base_loss)
    ratio = exp(float((loss - base_loss).mean()))
    root = math.sqrt(max(kld.size - 1, 1))
    return Divergence(
        perplexity=summarize(loss, len(loss), seconds),
        base_perplexity=exp(float(base_loss.mean())),
        perplexity_ratio=ratio,
        ratio_stderr=ratio * float((loss - base_loss).std()) / root,
        mean_kld=float(kld.mean()),
        kld_stderr=float(kld.std()) / root,
        median_kld=float(np.median(kld)),
        max_kld=float(kld.max()),
        percentiles={f"{p:g}": float(np.percentile(kld, p)) for p in PERCENTILES},
        rms_dp=float(np.sqrt((change**2).mean())),
        same_top=float(same.mean()),
    )
