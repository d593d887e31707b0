"""What was lost of each matrix, as a CSV table and a picture."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qjax.calibrate.blocks import Line
from qjax.evaluate.plots import plot_errors
from qjax.formats.atomic import atomic_file

COLUMNS = Line._fields


def write_log(lines: Sequence[Line], stem: Path, title: str) -> tuple[Path, Path]:
    """STEM.csv, a line a matrix with the fields of `Line`, and STEM.png.

    Raises:
      QjaxError: see `atomic_file`.
    """
    table = io.StringIO()
    _begun(table)(lines)
    path = stem.with_name(f"{stem.name}.csv")
    with atomic_file(path) as file:
        file.write(table.getvalue().encode())
    return path, plot_errors(facts(lines), stem.with_name(f"{stem.name}.png"), title=title)


@contextlib.contextmanager
def growing_log(path: Path) -> Iterator[Callable[[Sequence[Line]], None]]:
    """The table begun anew; gives what adds lines to it. Each is in the file at once, whatever ends the run."""
    with path.open("w", encoding="utf-8", newline="", buffering=1) as file:
        yield _begun(file)


def _begun(file: io.TextIOBase) -> Callable[[Sequence[Line]], None]:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    return writer.writerows


def facts(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines for `--json`."""
    return [line._asdict() for line in lines]
