"""What all commands say and how: JSON on stdout, everything else on stderr, tables and progress bars."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Tables wider than this would be cut where no terminal says its width.
PIPE_WIDTH = 160


class _Console(Console):
    """A console that leaves it to the command line what a closed pipe means: rich would end with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = _Console(stderr=True)


def emit_json(result: dict[str, Any]) -> None:
    """The one JSON object of a `--json` run, in ASCII: names in a file may hold what UTF-8 cannot."""
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    sys.stdout.flush()


def _showable(text: str) -> str:
    """Text with escapes for what stdout cannot show, rather than an end of the run."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def emit(text: str, end: str = "") -> None:
    """Result text, at once."""
    sys.stdout.write(_showable(text) + end)
    sys.stdout.flush()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, dense: bool = False) -> None:
    """A table on stdout; the first column is to the left, numbers are to the right. `dense` is for many columns."""
    table = Table(title=title, title_justify="left")
    if dense:
        table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    for i, column in enumerate(columns):
        # What has no room goes on in the next line: no digit is cut off.
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    for row in rows:
        # As Text: a name with brackets is no markup.
        table.add_row(*(Text(_showable(cell)) for cell in row))
    _Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


@contextlib.contextmanager
def progress_bar(label: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr that goes away when done; gives `advance(done=None, total=None, note="")`.

    Without a terminal, nothing is drawn.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(done: int | None = None, total: int | None = None, note: str = "") -> None:
            if done is None:
                progress.update(task, advance=1, note=note, total=total)
            else:
                progress.update(task, completed=done, note=note, total=total)

        yield advance


def say_resumed(done: int, total: int) -> None:
    """What is done of a file that a killed run began."""
    console.print(f"resuming: {done} of {total} tensors are done", markup=False)


def megabytes(count: int) -> str:
    """Bytes as MiB or GiB, in the way of llama-bench."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
