"""Files of pieces: killed at any moment, gone on with, and never half there."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qjax.errors import QjaxError
from qjax.formats import pieces
from qjax.formats.pieces import FileToWrite, Piece, Resume, fingerprint, write_files

COUNT = 24
SIZE = 5000


def content(number: int) -> bytes:
    return bytes([number + 1]) * (SIZE - number)


def whole(first: int = 0, last: int = COUNT) -> bytes:
    return b"head" + b"".join(content(n).ljust(SIZE, b"\0") for n in range(first, last))


def some_files(path: Path, made: list[int], *, shards: int = 1, stop: BaseException | None = None) -> list[FileToWrite]:
    """COUNT pieces in some files; `made` is told which are made, `stop` is raised in place of the tenth."""

    def make(number: int) -> Callable[[], bytes]:
        def data() -> bytes:
            if number == 9 and stop is not None:
                raise stop
            made.append(number)
            return content(number)

        return data

    each = COUNT // shards
    every = [Piece(SIZE, make(n)) for n in range(COUNT)]
    named = [path] if shards == 1 else [path.with_name(f"{path.name}-{n}") for n in range(shards)]
    return [FileToWrite(name, b"head", every[n * each : (n + 1) * each]) for n, name in enumerate(named)]


def interrupted(path: Path, *, shards: int = 1, stop: BaseException | None = None, mark: str = "a") -> None:
    stop = stop or KeyboardInterrupt()
    with pytest.raises(type(stop)):
        write_files(path, some_files(path, [], shards=shards, stop=stop), Resume(mark))


def gone_on(path: Path, resume: Resume, shards: int = 1) -> list[int]:
    """The pieces that a run makes."""
    made: list[int] = []
    write_files(path, some_files(path, made, shards=shards), resume)
    return made


def partial(path: Path) -> Path:
    [folder] = path.parent.glob(".*.partial")
    return folder


# It says which piece it makes and then waits for a word, so that it can be killed at that moment.
SLOW = """
import sys
from pathlib import Path
from qjax.formats.pieces import FileToWrite, Piece, Resume, write_files

def make(number):
    def data():
        print(number, flush=True)
        sys.stdin.readline()
        return bytes([number + 1]) * (5000 - number)
    return data

write_files(sys.argv[1], [FileToWrite(Path(sys.argv[1]), b"head", [Piece(5000, make(n)) for n in range(24)])],
            Resume("a", told=lambda done, total: print("done", done, total, flush=True)))
"""


def start(path: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", SLOW, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONPATH": root})


def lines_of(process: subprocess.Popen[str], count: int) -> list[str]:
    """What the process says, let go on after each line but the last of `count`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if len(lines) == count:
            break
        if not line.startswith("done"):
            let_go(process)
    return lines


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str], by: int = 0) -> int:
    if by:
        process.send_signal(by)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    return process.wait(60)


def test_killed_again_and_again(tmp_path: Path) -> None:
    path, made = tmp_path / "out.bin", []
    for count in (1, 4, 9):
        process = start(path)
        made += lines_of(process, count)
        assert end(process, signal.SIGKILL) == -signal.SIGKILL
        assert not path.exists()
    process = start(path)
    made += lines_of(process, 99)
    assert end(process) == 0
    assert path.read_bytes() == whole()
    assert list(tmp_path.iterdir()) == [path]
    # Only the piece that a kill met is made twice; the first run was killed in piece 0, the third said what was done.
    said = ["0", *"0123", "done 3 24", *map(str, range(3, 11)), "done 10 24", *map(str, range(10, 24))]
    assert made == said


def test_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    process = start(path)
    lines_of(process, 3)
    for mark in ("a", "b"):
        with pytest.raises(QjaxError, match=r"out\.bin: another process is writing this file"):
            gone_on(path, Resume(mark))
    let_go(process)
    lines_of(process, 99)
    assert end(process) == 0
    assert path.read_bytes() == whole()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left")])
def test_a_stopped_run_goes_on(tmp_path: Path, stop: BaseException) -> None:
    path, told = tmp_path / "out.bin", []
    path.write_bytes(b"old")
    path.chmod(0o640)
    if isinstance(stop, OSError):
        with pytest.raises(QjaxError, match=r"out\.bin: cannot be written: No space left"):
            write_files(path, some_files(path, [], stop=stop), Resume("a"))
    else:
        interrupted(path, stop=stop)
    assert path.read_bytes() == b"old"
    assert gone_on(path, Resume("a", told=lambda done, total: told.append((done, total)))) == list(range(9, COUNT))
    assert told == [(9, COUNT)]
    assert path.read_bytes() == whole()
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_next_run_would_meet_too_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out.bin", stop=QjaxError("not finite"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), QjaxError("no"), OSError(errno.EIO, "no")])
def test_nothing_is_left_of_what_cannot_go_on(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "out.bin"
    with pytest.raises((type(stop), QjaxError)):
        write_files(path, some_files(path, [], stop=stop))
    assert not list(tmp_path.iterdir())


def test_another_fingerprint_or_wish_begins_anew(tmp_path: Path) -> None:
    path, everything = tmp_path / "out.bin", list(range(COUNT))
    interrupted(path)
    assert gone_on(path, Resume("a", fresh=True)) == everything
    interrupted(path)
    assert gone_on(path, Resume("b")) == everything
    # Other files of the same name: the pieces' places differ.
    interrupted(path, shards=3)
    assert gone_on(path, Resume("a")) == everything
    assert path.read_bytes() == whole()
    assert list(tmp_path.iterdir()) == [path]


def cut(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)


def change(folder: Path, name: str, at: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)


FIRST_LINE = 65
DAMAGE = {
    "a torn record": (lambda folder: cut(folder, "record", FIRST_LINE + 9 * 4 + 5), 4),
    "no line of the record": (lambda folder: cut(folder, "record", 10), 0),
    "an empty record": (lambda folder: cut(folder, "record", 0), 0),
    "a changed record": (lambda folder: change(folder, "record", FIRST_LINE + 9 * 2 + 1), 2),
    "data that never reached the disk": (lambda folder: cut(folder, "0", 4 + SIZE * 5 + 7), 5),
    "changed data": (lambda folder: change(folder, "0", 4 + SIZE * 3), 3),
    "a changed header": (lambda folder: change(folder, "0", 2), 0),
    "no data": (lambda folder: (folder / "0").unlink(), 0),
    "more data than recorded": (lambda folder: cut(folder, "0", 4 + SIZE * 9 + 7), 9),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_only_what_agrees_with_the_record_counts(tmp_path: Path, what: str) -> None:
    path, (damage, done) = tmp_path / "out.bin", DAMAGE[what]
    interrupted(path)
    damage(partial(path))
    # Stopped once more, so that the mended record is read too.
    interrupted(path)
    made = gone_on(path, Resume("a"))
    assert made == list(range(9, COUNT))
    assert path.read_bytes() == whole()
    interrupted(path)
    damage(partial(path))
    assert gone_on(path, Resume("a")) == list(range(done, COUNT))
    assert path.read_bytes() == whole()


def names(folder: Path) -> Sequence[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def test_several_files_appear_when_all_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    interrupted(path, shards=3)
    assert names(tmp_path) == []
    # Stopped between two renames, where the first file is the last to get its name.
    install, installed = pieces.install, []

    def stopping(temporary: Path, target: Path) -> None:
        if installed:
            raise KeyboardInterrupt
        installed.append(target.name)
        install(temporary, target)

    monkeypatch.setattr(pieces, "install", stopping)
    with pytest.raises(KeyboardInterrupt):
        gone_on(path, Resume("a"), shards=3)
    assert names(tmp_path) == installed == ["out-2"]
    monkeypatch.setattr(pieces, "install", install)
    assert gone_on(path, Resume("a"), shards=3) == list(range(16, COUNT))
    assert names(tmp_path) == ["out-0", "out-1", "out-2"]
    assert [(tmp_path / f"out-{n}").read_bytes() for n in range(3)] == [whole(8 * n, 8 * n + 8) for n in range(3)]
    assert len(list(tmp_path.iterdir())) == 3


def test_fingerprint(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"12")
    first = fingerprint([source], "q4_k_m", 1)
    assert fingerprint([str(source)], "q4_k_m", 1) == first
    others = {fingerprint([source], "q4_k_m", 2), fingerprint([], "q4_k_m", 1)}
    os.utime(source, ns=(0, 1))
    others.add(fingerprint([source], "q4_k_m", 1))
    source.write_bytes(b"123")
    os.utime(source, ns=(0, 1))
    others.add(fingerprint([source], "q4_k_m", 1))
    assert len(others | {first}) == 5


def test_long_names_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / ("n" * 255)
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    interrupted(link)
    assert partial(target).parent == target.parent
    assert gone_on(target, Resume("a")) == list(range(9, COUNT))
    assert link.is_symlink()
    assert link.read_bytes() == whole()
