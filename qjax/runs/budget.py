"""Types under a budget of bytes: `qjax quantize --target-bpw 4.25` or `--target-size 3.5GiB`.

The model is looked at once (Fisher information, on text or on what it writes itself), every candidate type is tried on
every matrix, and the types that fit and lose least are chosen. What that is foretold to cost stands beside what it does.
"""

import dataclasses
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from qjax import api
from qjax.calibrate.budget import BLOCKED, SUPER_BLOCKED, Budgeted, choices, fit, stored
from qjax.calibrate.fisher import each, fisher
from qjax.calibrate.own_text import own_text
from qjax.errors import QjaxError
from qjax.evaluate.divergence import divergence, read_base, save_base
from qjax.formats.gguf.imatrix import Importances, read_imatrix, write_imatrix
from qjax.formats.gguf.mixes import mixes
from qjax.formats.gguf.places import is_quantizable
from qjax.formats.gguf.plan import Wish, plan
from qjax.formats.gguf.writer import header_nbytes
from qjax.formats.source import Source
from qjax.models.chunks import begun, chunks_of
from qjax.models.rewrite import planned
from qjax.runs.console import progress_bar
from qjax.runs.texts import open_model, read_text

CHUNKS, N_CTX = 8, 512
# How a tensor's block size decides what it may become.
_SUPER_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is asked for, and what it may be found by.

    bpw: bits a weight over all tensors; nbytes: of the whole file; one of them. data: a text file to look at the model
    on; None for text that it writes itself. chunks: of 512 tokens, of that text. types: to choose from; None for all.
    """

    bpw: float | None = None
    nbytes: int | None = None
    data: str | None = None
    chunks: int = CHUNKS
    types: Sequence[str] | None = None


class Found(NamedTuple):
    """A wish that fits the budget.

    expected: the divergence it is foretold to cost, nats a token. imatrix: the importances to encode by: the user's, or
    those found here, which `save` of `look` has written.
    """

    wish: Wish
    expected: float


def chunks_for(model: api.Model, budget: Budget) -> Int32[np.ndarray, "chunks n_ctx"]:
    """Chunks evenly from the text, or what the model writes.

    Raises:
      QjaxError: see `read_text` and `chunks_of`.
    """
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    n_ctx = min(N_CTX, model.config.context)
    if budget.data is None:
        with progress_bar("the model writes") as advance:
            return own_text(model.params, model.config, chunks=budget.chunks, n_ctx=n_ctx, bos_id=bos, progress=advance)
    ids = model.encode(read_text(budget.data))
    cut = begun(chunks_of(model.config, ids, n_ctx=n_ctx, bos_id=bos, chunks=None), bos)
    return cut[np.linspace(0, len(cut) - 1, min(budget.chunks, len(cut))).astype(int)]


def look(model: api.Model, budget: Budget) -> Importances:
    """Fisher information of a model."""
    chunks = chunks_for(model, budget)
    with progress_bar("gradients") as advance:
        found = fisher(model.params, model.config, chunks, progress=advance)
    return found._replace(datasets=(budget.data or OWN_TEXT,))


def candidates(source: Source, wish: Wish, kinds: Sequence[str] | None) -> dict[str, list[str]]:
    """The types that each matrix may get: what the user fixed by name, else those whose blocks its rows fill."""
    fixed = {"token_embd.weight": wish.embedding_type, "output.weight": wish.output_type}
    by_wish = plan(source, wish)
    found = {}
    for name, info in source.tensors.items():
        if not is_quantizable(name, info.shape):
            continue
        if fixed.get(name) or any(re.search(pattern, name, re.IGNORECASE) for pattern, _ in wish.overrides):
            found[name] = [by_wish[name]]
        else:
            found[name] = list(kinds or (BLOCKED if info.shape[-1] % _SUPER_BLOCK else SUPER_BLOCKED))
    return found


def room(source: Source, of: Mapping[str, Any], budget: Budget) -> int:
    """Bytes left for the matrices `of`, when all else is written.

    Raises:
      QjaxError: nothing is left.
    """
    rest = sum(stored(info.type, info.shape) for name, info in source.tensors.items() if name not in of)
    if budget.bpw is not None:
        left = int(budget.bpw * sum(math.prod(info.shape) for info in source.tensors.values()) / 8) - rest
    else:
        assert budget.nbytes is not None
        left = budget.nbytes - rest - header_nbytes(source)
    if left <= 0:
        raise QjaxError(f"{source.path}: the budget leaves nothing for matrices: give more")
    return left


def within(source: Source, wish: Wish, budget: Budget, known: Importances, columns: Importances) -> Found:
    """The wish with a type for each matrix by name, so that all fit the budget and lose least.

    Args:
      known: with Fisher information. columns: what encoders weight by.

    Raises:
      QjaxError: the budget is too small, or nothing is known of a matrix.
    """
    of = candidates(source, wish, budget.types)
    left = room(source, of, budget)
    with progress_bar("types tried", total=len(of)) as advance:
        tried = choices(source, of, each(known), columns.of, progress=lambda name: advance(note=name))
    best = fit(tried, left)
    weights = Counter[str]()
    for name, kind in best.types.items():
        weights[kind] += math.prod(source.tensors[name].shape)
    overrides = [(f"^{re.escape(name)}$", kind) for name, kind in best.types.items()]
    most = max(weights, key=lambda kind: weights[kind])
    return Found(Wish(_mix_like(most), overrides=overrides), best.divergence)


def _mix_like(kind: str) -> str:
    """The mix whose number stands in a file of mostly this type: the middle one of several."""
    alike = [name for name, mix in mixes().items() if mix.base == kind]
    return next((name for name in alike if name.endswith("_m")), alike[0])
