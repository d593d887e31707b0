"""Files of one model, quantized in several ways, side by side: a table, a plot, and rows for a spreadsheet."""

import csv
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax import api
from qjax.errors import QjaxError
from qjax.evaluate.compare import Candidate, Comparison, Row, compare
from qjax.evaluate.plots import plot_comparison, without_common_start
from qjax.formats.atomic import atomic_file
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.locate import locate
from qjax.formats.source import Source, open_source
from qjax.kernels import Activations
from qjax.runs.console import console, emit, megabytes, progress_bar, show_table


def compare_files(
    models: Sequence[str],
    text: str,
    out: Path,
    *,
    title: str,
    base: str | None = None,
    kl_base: str | None = None,
    ctx: int | None = None,
    chunks: int | None = None,
    against: str | None = None,
    activations: Activations = "float",
    resamples: int = 10_000,
) -> dict[str, Any]:
    """Run every model over the text; write `out`/compare.png and compare.csv, and give what they hold.

    Args:
      models, base, against: as `qjax.load` takes them; without `base` and `kl_base` the first float one is the base.
      title: of the plot, such as the text's name.

    Raises:
      QjaxError: see `compare`; no base, or two; a model twice.
    """
    if base is not None and kl_base is not None:
        raise QjaxError("give --base or --kl-base, one of them")
    paths = [locate(name).resolve() for name in models]
    if len(set(paths)) < len(paths):
        raise QjaxError(f"a model is given twice: {', '.join(models)}")
    partner = None if against is None else locate(against).resolve()
    if partner is not None and partner not in paths:
        raise QjaxError(f"{against} is not one of the models: {', '.join(models)}")
    base_path = None if base is None else locate(base).resolve()
    # Headers are read before hours of work, so that a file that cannot be opened is known at once.
    files = {path: open_source(path) for path in [*paths, *([] if base_path is None else [base_path])]}
    if base_path is None and kl_base is None:
        base_path = _first_float(files)
    names = _names(files)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QjaxError(f"{out}: cannot be made a folder: {error.strerror or error}") from error
    with progress_bar("comparing") as advance:
        bar = _Bar(advance, len(files))
        candidates = {path: _candidate(names[path], file, bar) for path, file in files.items()}
        found = compare(
            [candidates[path] for path in paths],
            text,
            base=Path(str(kl_base)) if base_path is None else candidates[base_path],
            n_ctx=ctx,
            chunks=chunks,
            against=None if partner is None else names[partner],
            activations=activations,
            resamples=resamples,
            folder=out,
            progress=bar.scored,
        )
    return _written(found, out, title)


class _Bar:
    """One bar for all models; a line for each that is done, which stays."""

    def __init__(self, advance: Callable[..., None], models: int) -> None:
        self._advance, self._models = advance, models
        self._done = self._each = self._finished = 0

    def loading(self, name: str, tensor: str) -> None:
        self._show(f"{name}: loading {tensor}")

    def scored(self, name: str, done: int, chunks: int, so_far: float) -> None:
        self._each = chunks
        self._done = self._finished * chunks + done
        self._show(f"{name}: {so_far:.6f}")
        if done == chunks:
            self._finished += 1
            console.print(
                f"{self._finished} of {self._models}: {name}: {so_far:.6f}", style="dim", markup=False, highlight=False
            )

    def _show(self, note: str) -> None:
        self._advance(self._done, self._models * self._each or None, note)


def _candidate(name: str, file: Source, bar: _Bar) -> Candidate:
    load = functools.partial(api.load, file.path, progress=functools.partial(bar.loading, name))
    return Candidate(name, load, sum(part.stat().st_size for part in file.files))


def _first_float(files: Mapping[Path, Source]) -> Path:
    for path, file in files.items():
        if all(info.type in FLOAT_TYPES for info in file.tensors.values()):
            return path
    raise QjaxError(
        "none of the models is of float weights: give the one they were made from by --base, or a file with its "
        "predictions by --kl-base"
    )


def _names(paths: Mapping[Path, Any]) -> dict[Path, str]:
    """What each is called: by its file, or by its whole path where two files have one name."""
    short = {path: path.name.removesuffix(".gguf") for path in paths}
    return short if len(set(short.values())) == len(short) else {path: str(path) for path in paths}


def _written(found: Comparison, out: Path, title: str) -> dict[str, Any]:
    rows = [_facts(row, row.name in found.front) for row in found.rows]
    last = found.rows[-1].found
    n_ctx = 2 * (last.perplexity.tokens // last.perplexity.chunks + 1)
    base = next((row.found.perplexity.perplexity for row in found.rows if row.is_base), last.base_perplexity)
    plot = plot_comparison(
        rows,
        out / "compare.png",
        base_perplexity=base,
        title=f"{title}: {last.perplexity.chunks} chunks of {n_ctx} tokens",
    )
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(out / "compare.csv") as file:
        file.write(table.getvalue().encode("utf-8", "backslashreplace"))
    return {
        "base_perplexity": base,
        "chunks": last.perplexity.chunks,
        "ctx": n_ctx,
        "rows": rows,
        "pairs": [pair._asdict() for pair in found.pairs],
        "plot": str(plot),
        "table": str(out / "compare.csv"),
    }


def _facts(row: Row, on_front: bool) -> dict[str, Any]:
    """A row flat, for JSON and CSV; shares of 1."""
    found = row.found
    return {
        "model": row.name,
        "bytes": row.nbytes,
        "bits_per_weight": row.bits_per_weight,
        "perplexity": found.perplexity.perplexity,
        "stderr": found.perplexity.stderr,
        "perplexity_ratio": found.perplexity_ratio,
        "ratio_stderr": found.ratio_stderr,
        "mean_kld": found.mean_kld,
        "kld_stderr": found.kld_stderr,
        "median_kld": found.median_kld,
        "kld_99": found.percentiles["99"],
        "max_kld": found.max_kld,
        "same_top": found.same_top,
        "rms_dp": found.rms_dp,
        "base": row.is_base,
        "pareto": on_front,
    }


def show(result: dict[str, Any]) -> None:
    """The rows as a table, and below it which differences are more than the text's chance."""
    rows = result["rows"]
    short = dict(zip([row["model"] for row in rows], without_common_start([row["model"] for row in rows]), strict=True))
    columns = ["model", "size", "bits", "PPL", "to base, %", "mean KLD", "median", "99 %", "max", "same top, %"]
    lines = [
        (
            short[row["model"]] + (" (base)" if row["base"] else " *" if row["pareto"] else ""),
            megabytes(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.3f} ± {row['stderr']:.3f}",
            *_to_base(row),
        )
        for row in rows
    ]
    title = f"{result['chunks']} chunks of {result['ctx']} tokens; base: PPL {result['base_perplexity']:.4f}"
    show_table(title, [*columns, "RMS dp, %"], lines, dense=True)
    emit("* none of as few bytes is nearer to the base\n")
    if result["pairs"]:
        pairs = [
            (
                f"{short[pair['a']]} - {short[pair['b']]}",
                f"{pair['difference']:+.6f}",
                f"{pair['low']:+.6f} to {pair['high']:+.6f}",
                f"{100 * pair['a_better']:.1f} %",
            )
            for pair in result["pairs"]
        ]
        columns = ["pair", "mean KLD, difference", "95 % interval", "resamples in which the first is nearer"]
        show_table("paired bootstrap over chunks", columns, pairs, dense=True)
    emit(f"plot: {result['plot']}\ntable: {result['table']}\n")


def _to_base(row: dict[str, Any]) -> list[str]:
    if row["base"]:
        return [""] * 7
    return [
        f"{100 * (row['perplexity_ratio'] - 1):+.2f}",
        f"{row['mean_kld']:.6f} ± {row['kld_stderr']:.6f}",
        f"{row['median_kld']:.6f}",
        f"{row['kld_99']:.4f}",
        f"{row['max_kld']:.3f}",
        f"{100 * row['same_top']:.2f}",
        f"{100 * row['rms_dp']:.3f}",
    ]
