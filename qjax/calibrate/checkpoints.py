"""Finished blocks in a folder, so that a run that was killed goes on where it was.

A record says what the run is of; each block is a file that appears whole or not at all. Who runs holds the record by
a lock, since two runs would write the same files.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from qjax.calibrate.blocks import Line, Weights
from qjax.errors import FormatError, QjaxError
from qjax.formats.atomic import atomic_file, refusals, remove_leftovers
from qjax.formats.huggingface.native import read_arrays, read_facts, write_arrays
from qjax.formats.pieces import lock

_RECORD, _LOG, _LINES, _ORDER = "run.json", "quantization.csv", "lines", "order"


class Checkpoints:
    """Blocks in an open folder; see `open_checkpoints`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def count(self, layers: int) -> int:
        """How many blocks, from the first on, are done."""
        return next((i for i in range(layers) if not self._path(i).exists()), layers)

    @property
    def log(self) -> Path:
        """A file for what was lost so far, for who wants to look; nothing is read from it."""
        return self.folder / _LOG

    def read(self, i: int) -> tuple[Weights, list[Line]]:
        """Block i as `write` was given it, with numpy leaves.

        Raises:
          FormatError: the file is damaged; says what to do.
        """
        with self._damage_of(i):
            facts, arrays = read_facts(self._path(i)), read_arrays(self._path(i))
            # In the order of the method, which files that are made of them keep.
            weights = {name: arrays[name] for name in json.loads(facts[_ORDER])}
            return weights, _lines(facts)

    def lines(self, i: int) -> list[Line]:
        """Those of block i, without a look at its weights.

        Raises:
          FormatError: see `read`.
        """
        with self._damage_of(i):
            return _lines(read_facts(self._path(i)))

    def write(self, i: int, weights: Weights, lines: list[Line]) -> None:
        """Keep a finished block.

        Raises:
          QjaxError: the disk refuses.
        """
        write_arrays(self._path(i), weights, {_LINES: json.dumps(lines), _ORDER: json.dumps(list(weights))})

    def remove(self) -> None:
        """Drop the folder: the run is over."""
        shutil.rmtree(self.folder)

    def _path(self, i: int) -> Path:
        return self.folder / f"block-{i:05d}.safetensors"

    @contextlib.contextmanager
    def _damage_of(self, i: int) -> Iterator[None]:
        try:
            yield
        except (QjaxError, KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{self._path(i)}: {error}: remove this file, or start anew (--fresh)") from error


def _lines(facts: Mapping[str, str]) -> list[Line]:
    return [Line(*line) for line in json.loads(facts[_LINES])]


@contextlib.contextmanager
def open_checkpoints(folder: str | Path, facts: Mapping[str, object], *, fresh: bool = False) -> Iterator[Checkpoints]:
    """The blocks of a run in its folder, which is made if there is none.

    Args:
      facts: all that the blocks' bits depend on, each under a word for it ("model", "data").
      fresh: drop what another run, or the same, has left.

    Raises:
      QjaxError: the folder holds blocks of another run, or something else, or another process is at it; it cannot be
        made.
    """
    folder = Path(folder)
    stamp = {key: hashlib.sha256(repr(fact).encode()).hexdigest() for key, fact in facts.items()}
    record = folder / _RECORD
    ours = ("lock", ".")
    if folder.is_dir() and not record.exists() and any(not entry.name.startswith(ours) for entry in folder.iterdir()):
        raise QjaxError(f"{folder}: is no unfinished run of qjax, yet its name is needed for one: move it away")
    with refusals(folder, folder):
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as file:
            if not lock(file):
                raise QjaxError(f"{folder}: another process is at this run: wait for it, or name another output")
            if fresh:
                _empty(folder)
            if record.exists():
                _check(record, stamp)
            else:
                with atomic_file(record) as out:
                    out.write(json.dumps(stamp, indent=1).encode())
            for path in folder.glob("block-*.safetensors"):
                remove_leftovers(path)
            yield Checkpoints(folder)


def _empty(folder: Path) -> None:
    # The record last: without it the rest is not known for ours.
    for path in [*folder.glob("block-*.safetensors"), folder / _LOG, folder / _RECORD]:
        path.unlink(missing_ok=True)


def _check(record: Path, stamp: Mapping[str, str]) -> None:
    way_out = "--fresh starts anew, or name another output"
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        other = [key for key, value in stamp.items() if found.get(key) != value]
    except (ValueError, AttributeError) as error:
        raise QjaxError(f"{record}: is damaged: {way_out}") from error
    if other:
        raise QjaxError(f"{record.parent}: an unfinished run of another {' and other '.join(other)}: {way_out}")
