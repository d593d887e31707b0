"""A model over a text to an importance matrix in a file; a run that was killed goes on where it was."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qjax.api import Model
from qjax.calibrate import fisher
from qjax.calibrate.importance import accumulate, nothing
from qjax.calibrate.statistics import statistics
from qjax.errors import QjaxError
from qjax.formats.atomic import check_writable, remove_leftovers
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.imatrix import Importances, merge, read_imatrix, write_imatrix
from qjax.formats.locate import locate
from qjax.models.chunks import begun, chunks_of
from qjax.runs.console import show_table
from qjax.runs.texts import open_model
from qjax.text.files import read_text

# Bytes of a model file that are looked at to tell it from another: its header, or most of it.
_HEADER = 1 << 20
_STAMP = "qjax.calibration."

Progress = Callable[[int, int, float], None]


def calibrate(
    name: str,
    data: str | Path,
    target: str | Path,
    *,
    ctx: int = 512,
    chunks: int | None = None,
    output: bool = False,
    batch: int = 1,
    of_gradients: bool = False,
    fresh: bool = False,
    save_every: float = 30.0,
    progress: Progress = lambda done, total, rate: None,
) -> dict[str, Any]:
    """Write the importances of a model on a text, whole or not at all.

    The state so far is kept in TARGET.partial. A run with the same model, text and options goes on from it, and ends
    with the same bytes as an undisturbed one.

    Args:
      name: a model as `qjax.load` takes it, float or quantized.
      data: a UTF-8 text file.
      ctx: tokens of a chunk. chunks: only this many. batch: how many are run at once.
      output: of the output matrix too.
      of_gradients: Fisher information in place of the inputs' mean squares, of all matrices and a chunk at a time.
      fresh: forget an unfinished run.
      save_every: seconds between two states on the disk.
      progress: called as (chunks done, chunks, tokens a second).

    Raises:
      QjaxError: the model, its tokenizer or the text cannot be used; the text is shorter than a chunk; the target
        cannot be written, or is one of the files that are read; an unfinished run there is of something else.
    """
    source, partial = locate(name), Path(f"{target}.partial")
    for path in (target, partial):
        check_writable(path)
        if any(Path(path).exists() and Path(path).samefile(read) for read in (source, data) if Path(read).exists()):
            raise QjaxError(f"{path}: is read by this run: name another file by -o")
        remove_leftovers(path)
    text = read_text(data)
    stamp = _stamp(
        source, text, {"ctx": ctx, "chunks": chunks, "output": output, "batch": batch, "gradients": of_gradients}
    )
    before = _resumed(partial, stamp) if partial.exists() and not fresh else nothing(ctx, (str(data),))
    model = open_model(str(source))
    bos = model.tokenizer.first_id
    cut = begun(chunks_of(model.config, model.encode(text), n_ctx=ctx, bos_id=bos, chunks=chunks), bos)
    if fresh:
        partial.unlink(missing_ok=True)
    found, start = before, time.monotonic()
    saved, seconds, rate = start, 0.0, 0.0
    progress(found.chunks, len(cut), rate)
    count = fisher.accumulate if of_gradients else functools.partial(accumulate, output=output, batch=batch)
    for found in _states(model, count(model.params, model.config, cut, before)):
        now = time.monotonic()
        seconds = now - start
        rate = (found.chunks - before.chunks) * ctx / max(seconds, 1e-9)
        progress(found.chunks, len(cut), rate)
        if now - saved >= save_every:
            write_imatrix(partial, found, exact=True, metadata=stamp)
            saved = now
    write_imatrix(target, found)
    partial.unlink(missing_ok=True)
    return {
        **facts(target, found),
        "tokens": cut.size,
        "resumed_chunks": before.chunks,
        "seconds": seconds,
        "tokens_per_second": rate,
    }


def _states(model: Model, states: Iterator[Importances]) -> Iterator[Importances]:
    """What was found so far, again and again, with the model named in errors."""
    try:
        yield from states
    except QjaxError as error:
        raise type(error)(f"{model.source}: {error}") from error


def merge_files(paths: Sequence[str], target: str | Path, *, ctx: int) -> dict[str, Any]:
    """Write the importances of several files together, as of one text. `ctx`: tokens of a chunk, see `merge`.

    Raises:
      QjaxError: a file cannot be read, or they are of different models.
    """
    check_writable(target)
    merged = merge([read_imatrix(path) for path in paths], chunk_size=ctx)
    write_imatrix(target, merged)
    return facts(target, merged)


def facts(path: str | Path, found: Importances) -> dict[str, Any]:
    """What was written, for `--json`."""
    return {
        "path": str(path),
        "entries": len(found.sums),
        "chunks": found.chunks,
        "ctx": found.chunk_size,
        "datasets": list(found.datasets),
    }


def statistics_of(path: str) -> list[dict[str, Any]]:
    """`statistics` of a file, for `--json`.

    Raises:
      QjaxError: see `read_imatrix`.
    """
    return [line._asdict() for line in statistics(read_imatrix(path))]


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The statistics as a table."""
    rows = []
    for line in lines:
        first, *others = (name.removesuffix(".weight") for name in line["names"])
        same = "".join(f", {other.rpartition('.')[2]}" for other in others)
        sizes = (f"{line[key]:.3g}" for key in ("total", "least", "most", "mean", "deviation"))
        shares = (f"{100 * line[key]:.2f}" for key in ("active", "entropy", "outlying"))
        similar = "" if line["similarity"] is None else f"{line['similarity']:.4f}"
        rows.append((first + same, *sizes, *shares, similar))
    columns = ["input of", "sum", "min", "max", "mean", "std", "active %", "entropy %", "z > 1 %", "cosine"]
    show_table("Mean squares of the columns", columns, rows)


def _stamp(source: Path, text: str, options: dict[str, Any]) -> dict[str, str]:
    """What a run is of, in metadata keys: two runs with the same stamp compute the same."""
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        facts = path.stat()
        digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns} ".encode())
        if path.is_file():
            with path.open("rb") as file:
                digest.update(file.read(_HEADER))
    return {
        f"{_STAMP}model": digest.hexdigest(),
        f"{_STAMP}text": hashlib.sha256(text.encode()).hexdigest(),
        f"{_STAMP}options": " ".join(f"{key}={value}" for key, value in options.items()),
    }


def _resumed(partial: Path, stamp: dict[str, str]) -> Importances:
    """The state of an unfinished run.

    Raises:
      QjaxError: it is damaged, or of another run.
    """
    way_out = "--fresh starts anew, or name another file by -o"
    try:
        found, metadata = read_imatrix(partial), open_gguf(partial).metadata
    except QjaxError as error:
        raise type(error)(f"{error}; {way_out}") from error
    other = [key.removeprefix(_STAMP) for key, value in stamp.items() if metadata.get(key) != value]
    if other:
        raise QjaxError(f"{partial}: an unfinished run of another {' and other '.join(other)}: {way_out}")
    return found
