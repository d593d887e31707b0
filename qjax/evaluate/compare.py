"""Several models of one vocabulary on one text: how far each is from a base, and which is worth its bytes.

The base's predictions are computed once and lie in a file; then one model after the other is opened, run over the text
and let go, so that one is in memory at a time.
"""

import contextlib
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from qjax.arrays import Memory
from qjax.errors import QjaxError
from qjax.evaluate.bootstrap import paired_bootstrap
from qjax.evaluate.divergence import (
    Divergence,
    Scores,
    check_text,
    read_base,
    save_base,
    score_against,
    statistics,
)
from qjax.evaluate.perplexity import check_finite
from qjax.kernels import Activations
from qjax.models import ModelConfig
from qjax.models.chunks import chunks_of
from qjax.text import Tokenizer

DEFAULT_CTX = 512


@runtime_checkable
class LanguageModel(Protocol):
    """What is asked of an open model; `qjax.load` gives one."""

    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def config(self) -> ModelConfig: ...
    @functools.cached_property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def memory(self) -> Memory: ...
    def encode(self, text: str) -> list[int]: ...


class Candidate(NamedTuple):
    """A model that is opened when its turn comes.

    nbytes: what it is shown to cost, such as its file's size; None: the bytes of its weights.
    """

    name: str
    open: Callable[[], LanguageModel]
    nbytes: int | None = None


class Row(NamedTuple):
    """What was measured of a model; of the base itself no divergence. `chunk_kld`: the mean of each chunk, nats."""

    name: str
    nbytes: int
    bits_per_weight: float
    found: Divergence
    chunk_kld: Float64[np.ndarray, " chunks"]
    is_base: bool


class Pair(NamedTuple):
    """Two models on the same chunks: `a`'s mean divergence less `b`'s in nats, its 95 % interval from `low` to `high`,
    and the share of resamples in which `a` is nearer to the base."""

    a: str
    b: str
    difference: float
    low: float
    high: float
    a_better: float


class Comparison(NamedTuple):
    """rows: by bytes, then divergence. front: names of those of which none smaller is as near to the base."""

    rows: list[Row]
    front: list[str]
    pairs: list[Pair]


# Told the model's name, chunks done, chunks, and its figure so far: the base's perplexity, the others' divergence.
Progress = Callable[[str, int, int, float], None]


class _Options(NamedTuple):
    n_ctx: int | None
    chunks: int | None
    activations: Activations
    progress: Progress


def compare(
    models: Sequence[Candidate],
    text: str,
    *,
    base: Candidate | Path,
    n_ctx: int | None = None,
    chunks: int | None = None,
    against: str | None = None,
    activations: Activations = "float",
    resamples: int = 10_000,
    folder: Path | None = None,
    progress: Progress = lambda name, done, total, so_far: None,
) -> Comparison:
    """Perplexity of each model and its KL divergence to the base, with a paired bootstrap of those of like size.

    Args:
      models: their names are unique; the base may be among them, and is run once in any case.
      base: a model of float weights, as a rule; or a file with its predictions (`save_base`, llama-perplexity).
      n_ctx: tokens of a chunk; None for the base file's, or else 512.
      chunks: only this many of the text; None for all.
      against: the name of the model that each other one is paired with; None pairs neighbours in size.
      folder: where the base's predictions lie meanwhile, 2 bytes a token of the vocabulary for half of the text's
        tokens; None for the system's temporary folder.

    Raises:
      QjaxError: see `chunks_of`, `read_base` and `save_base`; a model of another tokenizer, one whose weights are
        damaged, two of one name, or no model.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise QjaxError(f"expected models of different names, got {', '.join(names) or 'none'}")
    if against is not None and against not in names:
        raise QjaxError(f"{against} is not among the models that are compared: {', '.join(names)}")
    options = _Options(n_ctx, chunks, activations, progress)
    with _predictions(base, text, folder, options) as found:
        rest = [model for model in models if found.row is None or model.name != found.row.name]
        rows = [
            *([] if found.row is None else [found.row]),
            *(_measured(model, text, found, options) for model in rest),
        ]
    rows.sort(key=lambda row: (row.nbytes, row.found.mean_kld))
    others = [row for row in rows if not row.is_base]
    return Comparison(rows, pareto_front(others), _pairs(rows, others, against, resamples))


class _Predictions(NamedTuple):
    """A file with the base's predictions; and where the base was run for it, its row and exact losses."""

    path: Path
    row: Row | None = None
    losses: Float64[np.ndarray, "chunks n"] | None = None


@contextlib.contextmanager
def _predictions(base: Candidate | Path, text: str, folder: Path | None, options: _Options) -> Iterator[_Predictions]:
    if isinstance(base, Path):
        yield _Predictions(base)
        return
    with tempfile.TemporaryDirectory(prefix=".qjax-", dir=folder) as made:
        yield _saved(base, text, Path(made) / "base.kld", options)


def _saved(base: Candidate, text: str, path: Path, options: _Options) -> _Predictions:
    model = base.open()
    bos = model.tokenizer.first_id
    n_ctx = options.n_ctx or DEFAULT_CTX
    cut = chunks_of(model.config, model.encode(text), n_ctx=n_ctx, bos_id=bos, chunks=options.chunks)
    start = time.perf_counter()
    losses = save_base(
        path,
        model.params,
        model.config,
        cut,
        bos_id=bos,
        activations=options.activations,
        progress=lambda *done: options.progress(base.name, *done),
    )
    itself = Scores(losses, losses, np.zeros_like(losses), np.ones(losses.shape, np.bool_))
    return _Predictions(path, _row(base, model, itself, time.perf_counter() - start, is_base=True), losses)


def _measured(candidate: Candidate, text: str, predictions: _Predictions, options: _Options) -> Row:
    model = candidate.open()
    try:
        base = read_base(predictions.path, model.config)
        check_text(base, model.encode(text))
    except QjaxError as error:
        raise type(error)(f"{candidate.name} cannot be compared: {error}") from error
    if options.n_ctx not in (None, base.tokens.shape[1]):
        raise QjaxError(f"{base.path}: has chunks of {base.tokens.shape[1]} tokens, not {options.n_ctx}")
    start = time.perf_counter()
    scores = score_against(
        model.params,
        model.config,
        base,
        bos_id=model.tokenizer.first_id,
        chunks=options.chunks,
        activations=options.activations,
        progress=lambda *done: options.progress(candidate.name, *done),
    )
    if predictions.losses is not None:
        # Of what the base finds least likely the file knows a bound only.
        scores = scores._replace(base_loss=predictions.losses)
    return _row(candidate, model, scores, time.perf_counter() - start, is_base=False)


def _row(candidate: Candidate, model: LanguageModel, scores: Scores, seconds: float, is_base: bool) -> Row:
    found = statistics(scores, seconds)
    check_finite(candidate.name, found.perplexity.perplexity, found.mean_kld)
    size = model.memory
    nbytes = size.nbytes if candidate.nbytes is None else candidate.nbytes
    return Row(candidate.name, nbytes, size.bits_per_weight, found, scores.kld.mean(axis=1), is_base)


def pareto_front(rows: Sequence[Row]) -> list[str]:
    """Names of those that are nearer to the base than all that are no larger; `rows` in the order of `Comparison`."""
    front, nearest = [], math.inf
    for row in rows:
        if row.found.mean_kld < nearest:
            front.append(row.name)
            nearest = row.found.mean_kld
    return front


def _pairs(rows: Sequence[Row], others: Sequence[Row], against: str | None, resamples: int) -> list[Pair]:
    """Neighbours in size, or each with one; none where there is but a chunk, which leaves nothing to draw from."""
    if against is None:
        pairs = list(itertools.pairwise(others))
    else:
        one = next(row for row in rows if row.name == against)
        pairs = [(row, one) for row in others if row is not one]
    if not pairs or len(pairs[0][0].chunk_kld) < 2:
        return []
    found = paired_bootstrap(np.stack([a.chunk_kld - b.chunk_kld for a, b in pairs]), resamples=resamples)
    return [Pair(a.name, b.name, *map(float, values)) for (a, b), *values in zip(pairs, *found, strict=True)]
