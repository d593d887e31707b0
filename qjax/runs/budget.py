"""Types under a budget of bytes: `qjax quantize --target-bpw 4.25` or `--target-size 3.5GiB`.

The model is looked at once (Fisher information, on text or on what it writes itself), every candidate type is tried
on every matrix, and the types that fit and lose least are chosen. What they are expected to cost stands beside what
they do.
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
from qjax.calibrate.budget import BLOCKED, SUPER_BLOCKED, choices, fit, stored
from qjax.calibrate.fisher import each, fisher
from qjax.calibrate.own_text import own_text
from qjax.errors import QjaxError
from qjax.evaluate.divergence import Divergence, divergence, read_base, save_base
from qjax.formats.atomic import check_writable
from qjax.formats.gguf.imatrix import Importances, read_imatrix, write_imatrix
from qjax.formats.gguf.mixes import mixes
from qjax.formats.gguf.places import is_quantizable
from qjax.formats.gguf.plan import Wish, plan
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.gguf.writer import TensorToWrite, header_nbytes
from qjax.formats.locate import locate
from qjax.formats.source import Source, open_source
from qjax.models.chunks import begun, chunks_of
from qjax.models.rewrite import check_encodable, plan_mix
from qjax.quantizers.ggml import Effort
from qjax.runs.console import progress_bar
from qjax.runs.quantize import dry_run, quantize_file
from qjax.runs.texts import open_model
from qjax.text.files import read_text

CHUNKS, N_CTX = 8, 512
OWN_TEXT = "text of the model's own"
_SUPER_BLOCK = 256
# What quantizing adds to a file's metadata, names of files in it included.
_MORE_KEYS = 1024


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

    def __post_init__(self) -> None:
        if self.bpw is not None and not 0 < self.bpw < math.inf:
            raise QjaxError(f"expected a positive number of bits a weight, got {self.bpw}")
        if self.chunks < 1:
            raise QjaxError(f"expected at least one chunk, got {self.chunks}")


class Found(NamedTuple):
    """A wish that fits the budget, and the divergence that it is expected to cost, nats a token."""

    wish: Wish
    expected: float


def chunks_for(model: api.Model, budget: Budget) -> Int32[np.ndarray, "chunks n_ctx"]:
    """Chunks evenly from the text, or what the model writes.

    Raises:
      QjaxError: see `read_text` and `chunks_of`.
    """
    bos = model.tokenizer.first_id
    n_ctx = min(N_CTX, model.config.context)
    if budget.data is None:
        with progress_bar("the model writes") as advance:
            return own_text(model.params, model.config, chunks=budget.chunks, n_ctx=n_ctx, bos_id=bos, progress=advance)
    ids = model.encode(read_text(budget.data))
    cut = begun(chunks_of(model.config, ids, n_ctx=n_ctx, bos_id=bos, chunks=None), bos)
    return cut[np.linspace(0, len(cut) - 1, min(budget.chunks, len(cut))).astype(int)]


def look(model: api.Model, chunks: Int32[np.ndarray, "chunks n_ctx"], dataset: str) -> Importances:
    """Fisher information of a model on chunks of text."""
    with progress_bar("gradients") as advance:
        found = fisher(model.params, model.config, chunks, progress=advance)
    return found._replace(datasets=(dataset,))


def candidates(source: Source, wish: Wish, kinds: Sequence[str] | None) -> dict[str, list[str]]:
    """The types that each matrix may get: what the user fixed by name, else those whose blocks its rows fill.

    Raises:
      QjaxError: none is left; a type without an encoder.
    """
    # Of tied embeddings the output's type is the embedding's.
    tied = None if "output.weight" in source.tensors else wish.output_type
    fixed = {"token_embd.weight": wish.embedding_type or tied, "output.weight": wish.output_type}
    by_wish = plan(source, wish)
    found = {}
    for name, info in source.tensors.items():
        if not is_quantizable(name, info.shape):
            continue
        if fixed.get(name) or any(re.search(pattern, name, re.IGNORECASE) for pattern, _ in wish.overrides):
            found[name] = [by_wish[name]]
        else:
            wanted = kinds or (BLOCKED if info.shape[-1] % _SUPER_BLOCK else SUPER_BLOCKED)
            found[name] = [kind for kind in wanted if info.shape[-1] % GGML_TYPES[kind].block_size == 0]
        if not found[name]:
            raise QjaxError(f"{source.path}: {name} has rows of {info.shape[-1]}: none of the types has such blocks")
        for kind in found[name]:
            check_encodable(source.path, name, kind)
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
        tensors = [TensorToWrite(name, i.shape, i.type, np.empty(0, np.uint8)) for name, i in source.tensors.items()]
        left = budget.nbytes - rest - header_nbytes(source.metadata, tensors, metadata_types=source.metadata_types)
        left -= _MORE_KEYS
    if left <= 0:
        raise QjaxError(f"{source.path}: the budget leaves nothing for matrices: give more")
    return left


def within(
    source: Source,
    of: Mapping[str, Sequence[str]],
    nbytes: int,
    known: Importances,
    columns: Importances,
    effort: Effort,
) -> Found:
    """The wish with a type for each matrix by name, so that all fit `nbytes` and lose least.

    Args:
      of: see `candidates`.
      known: with Fisher information. columns: what encoders weight by. effort: of theirs.

    Raises:
      QjaxError: the budget is too small, or nothing is known of a matrix.
    """
    with progress_bar("types tried", total=len(of)) as advance:
        tried = choices(source, of, each(known), columns.of, effort=effort, progress=lambda name: advance(note=name))
    best = fit(tried, nbytes)
    weights = Counter[str]()
    for name, kind in best.types.items():
        weights[kind] += math.prod(source.tensors[name].shape)
    overrides = [(f"^{re.escape(name)}$", kind) for name, kind in best.types.items()]
    return Found(Wish(_mix_like(max(weights, key=lambda kind: weights[kind])), overrides=overrides), best.divergence)


def _mix_like(kind: str) -> str:
    """The mix whose number stands in a file of mostly this type: the middle one of several."""
    alike = [name for name, mix in mixes().items() if mix.base == kind]
    return next((name for name in alike if name.endswith("_m")), alike[0] if alike else "q8_0")


def quantize_within(
    name: str | Path,
    target: str | Path | None,
    wish: Wish,
    budget: Budget,
    *,
    imatrix: str | Path | None = None,
    effort: Effort = "normal",
    **options: Any,
) -> dict[str, Any]:
    """`quantize_file` with types that fit a budget; None as target only plans.

    Importances with Fisher information (`qjax calibrate --fisher`) are taken as they are. Else the model is looked at,
    and what is found lies beside the target: TARGET-fisher.gguf.

    Returns:
      What `quantize_file` does, and expected_kld; measured_kld on the text that was looked at, where there was one.

    Raises:
      QjaxError: see `within`, `quantize_file` and `chunks_for`.
    """
    source = open_source(locate(name))
    given = None if imatrix is None else read_imatrix(imatrix)
    # What would be refused after hours is refused now.
    plan_mix(source, wish, requantize=options.get("requantize", False))
    of = candidates(source, wish, budget.types)
    left = room(source, of, budget)
    if target is not None:
        check_writable(target)
        if Path(target).exists() and any(Path(target).samefile(file) for file in source.files):
            raise QjaxError(f"{target}: is the file that is read: name another one")
    chunks = None
    if given is not None and given.row_sums:
        known = given
        if budget.data is not None:
            chunks = chunks_for(open_model(str(name)), budget)
    else:
        model = open_model(str(name))
        chunks = chunks_for(model, budget)
        known = look(model, chunks, budget.data or OWN_TEXT)
        del model
    found = within(source, of, left, known, given or known, effort)
    expected = {"expected_kld": found.expected}
    if target is None:
        return {**dry_run(name, found.wish, requantize=options.get("requantize", False)), **expected}
    if imatrix is None:
        imatrix = Path(target).with_name(f"{Path(target).stem}-fisher.gguf")
        write_imatrix(imatrix, known)
    with progress_bar(f"writing {target}") as advance:
        result = quantize_file(
            name,
            target,
            found.wish,
            imatrix=imatrix,
            effort=effort,
            progress=lambda name: advance(note=name),
            **options,
        )
    result |= {**expected, "imatrix": str(imatrix)}
    if chunks is not None:
        cost = measured(name, result["path"], chunks)
        result |= {"measured_kld": cost.mean_kld, "measured_kld_stderr": cost.kld_stderr}
    return result


def measured(base: str | Path, made: str, chunks: Int32[np.ndarray, "chunks n_ctx"]) -> Divergence:
    """Of a file to the model that it was made of; one of them is in memory at a time."""
    with tempfile.TemporaryDirectory() as folder, progress_bar("measuring", total=2 * len(chunks)) as advance:
        path = Path(folder) / "base.kld"
        step = lambda done, total, so_far: advance(total=2 * len(chunks))
        # The chunks begin with BOS already, where the model has one.
        model = api.load(base)
        save_base(path, model.params, model.config, chunks, bos_id=None, progress=step)
        del model
        model = api.load(made)
        return divergence(model.params, model.config, read_base(path, model.config), bos_id=None, progress=step)
