"""Write files piece by piece, so that they appear whole, all at once or not at all, and a killed run goes on.

They are made in a hidden folder beside the target: the files themselves and a record with the CRC-32 of each piece
that is done. After a kill or a power cut only what agrees with the record counts, so nothing is flushed to the disk
until the end. Who writes holds the record by flock.
"""

import contextlib
import hashlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from qjax.errors import QjaxError
from qjax.formats.atomic import checked_target, install, refusals, sync_folder, temporary_stem

try:
    import fcntl
except ImportError:  # not a POSIX system: who writes one file twice at once is not warned there
    fcntl = None

_RECORD = "record"
_READ_BYTES = 1 << 20


class Piece(NamedTuple):
    """`size` bytes of a file: what `make` gives when their turn comes, then zeros."""

    size: int
    make: Callable[[], bytes | memoryview]


class FileToWrite(NamedTuple):
    """A file of `head` and then `pieces`."""

    path: Path
    head: bytes
    pieces: Sequence[Piece]


class Resume(NamedTuple):
    """How a run goes on where a killed one stopped.

    Attributes:
        fingerprint: of all that the pieces are made of; see `fingerprint`. What a run with another one left is dropped.
        fresh: drop what any run left.
        told: told how many pieces, of how many, are done already, if any are.
    """

    fingerprint: str
    fresh: bool = False
    told: Callable[[int, int], None] = lambda done, total: None


def fingerprint(sources: Iterable[str | Path], *facts: object) -> str:
    """A text that changes with the facts, and with place, size or time of change of a source file.

    Raises:
        OSError: a source is missing.
    """
    files = [Path(source).resolve() for source in sources]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return repr((states, facts))


def write_files(path: str | Path, files: Sequence[FileToWrite], resume: Resume | None = None) -> None:
    """Write the files, one piece in memory at a time; none takes its name before all are on the disk.

    Args:
        path: the name the user gave: of the file, or what the names of several are made of.
        files: at least one, all in one folder. The first takes its name last.
        resume: None if nothing is to stay of a run that fails. With it, what is done stays after all but a QjaxError,
            which the next run would meet too.

    Raises:
        QjaxError: the folder is missing, a path is a directory, the disk refuses, or another process writes the same.
    """
    targets = [checked_target(file.path) for file in files]
    folder = _folder(targets[0] if len(files) == 1 else targets[0].with_name(Path(path).name), resume)
    with refusals(path, folder), _held(folder / _RECORD, path) as record:
        keep = False
        try:
            done = 0 if resume is None else _resumed(record, folder, files, resume)
            for number, file in enumerate(files):
                kept = min(done, len(file.pieces))
                _write(folder / str(number), file, kept, record)
                done -= kept
            # Backwards: who sees the first of several finds the others, and what a kill leaves here is a beginning.
            for number in reversed(range(len(files))):
                install(folder / str(number), targets[number])
        except QjaxError:
            raise
        except BaseException:
            keep = resume is not None
            raise
        finally:
            if not keep:
                _remove(folder)
    sync_folder(folder.parent)


def _folder(target: Path, resume: Resume | None) -> Path:
    """Where the files are made: always the same for one target if the run may go on."""
    end = f"{secrets.token_hex(8)}.tmp" if resume is None else "partial"
    return target.with_name(f"{temporary_stem(target)}{end}")


@contextlib.contextmanager
def _held(record: Path, path: str | Path) -> Iterator[BinaryIO]:
    """The record, in its folder, open to read and append; QjaxError if another process has it."""
    while True:
        record.parent.mkdir(exist_ok=True)
        try:
            file = record.open("a+b")
        except FileNotFoundError:  # the process that had the folder has just removed it
            continue
        with file:
            if not lock(file):
                raise QjaxError(f"{path}: another process is writing this file: wait for it, or name another file")
            if record.exists() and os.path.samestat(record.stat(), os.fstat(file.fileno())):
                yield file
                return


def lock(file: IO[Any]) -> bool:
    """Whether this process has the file for itself now, until it is closed; where the system knows no locks, it has."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def _resumed(record: BinaryIO, folder: Path, files: Sequence[FileToWrite], resume: Resume) -> int:
    """How many pieces are done already; the record then holds these, and what they are of."""
    facts = [resume.fingerprint.encode("utf-8", "surrogatepass")]
    facts += [part for file in files for part in (file.head, repr([piece.size for piece in file.pieces]).encode())]
    first = hashlib.sha256(b"".join(hashlib.sha256(fact).digest() for fact in facts)).hexdigest().encode()
    record.seek(0)
    lines = record.read().split(b"\n")
    if resume.fresh or lines[0] != first:
        _empty(folder)
        record.truncate(0)
        record.write(first + b"\n")
        return 0
    # The last line may be torn.
    done = _agreeing(folder, files, lines[1:-1])
    record.truncate(sum(len(line) + 1 for line in lines[: done + 1]))
    if done:
        resume.told(done, sum(len(file.pieces) for file in files))
    return done


def _agreeing(folder: Path, files: Sequence[FileToWrite], lines: list[bytes]) -> int:
    """How many pieces, from the first on, lie in the folder as the record has them."""
    done = 0
    for number, file in enumerate(files):
        try:
            opened = (folder / str(number)).open("rb")
        except FileNotFoundError:
            return done
        with opened:
            if opened.read(len(file.head)) != file.head:
                return done
            for piece in file.pieces:
                if done == len(lines) or _read_line(opened, piece.size) != lines[done]:
                    return done
                done += 1
    return done


def _read_line(file: BinaryIO, size: int) -> bytes | None:
    """The record's line for the next `size` bytes; None if the file ends before."""
    crc = 0
    while size:
        data = file.read(min(size, _READ_BYTES))
        if not data:
            return None
        crc, size = zlib.crc32(data, crc), size - len(data)
    return _line(crc)


def _line(crc: int) -> bytes:
    return b"%08x" % crc


def _write(path: Path, file: FileToWrite, kept: int, record: BinaryIO) -> None:
    """Write what the file lacks after its first `kept` pieces, and flush it to the disk."""
    with path.open("r+b" if kept else "w+b") as out:
        if kept:
            out.seek(len(file.head) + sum(piece.size for piece in file.pieces[:kept]))
            out.truncate()
        else:
            out.write(file.head)
        for piece in file.pieces[kept:]:
            data = piece.make()
            padding = bytes(piece.size - len(data))
            out.write(data)
            out.write(padding)
            out.flush()
            record.write(_line(zlib.crc32(padding, zlib.crc32(data))) + b"\n")
            record.flush()
        out.flush()
        os.fsync(out.fileno())


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != _RECORD:
            entry.unlink()


def _remove(folder: Path) -> None:
    """The record last, since another process may make its own in the folder as soon as this one is gone."""
    _empty(folder)
    (folder / _RECORD).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
