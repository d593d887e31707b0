import errno
import os
import stat

import pytest

from qjax.errors import QjaxError
from qjax.formats.atomic import atomic_file, check_writable, remove_leftovers, temporary_stem


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.bin"


def test_appears_only_at_the_end(target):
    with atomic_file(target) as file:
        file.write(b"new")
        file.flush()
        assert not target.exists()
        assert [p.parent for p in target.parent.iterdir()] == [target.parent]
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_replaces_and_keeps_permissions(target):
    target.write_bytes(b"old")
    target.chmod(0o640)
    with atomic_file(str(target)) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_file_follows_the_umask(target):
    old = os.umask(0o027)
    try:
        with atomic_file(target):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, OSError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_failure_removes_the_temporary_file(target, error, old):
    if old is not None:
        target.write_bytes(old)

    def write():
        with atomic_file(target) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert [p.read_bytes() for p in target.parent.iterdir()] == ([] if old is None else [old])


def test_readers_keep_the_old_file(target):
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        with atomic_file(target) as file:
            file.write(b"new")
        assert reader.read() == b"old"


def test_symbolic_link_stays_one(tmp_path, target):
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_longest_name(tmp_path):
    target = tmp_path / ("n" * 255)
    with atomic_file(target) as file:
        file.write(b"x")
    assert target.read_bytes() == b"x"


def open_and_leave(path):
    with atomic_file(path):
        pass


def test_folder_missing(tmp_path):
    with pytest.raises(QjaxError, match=r"there is no folder .*none: make it first"):
        open_and_leave(tmp_path / "none" / "file")


def test_directory(tmp_path):
    with pytest.raises(QjaxError, match="it is a directory"):
        open_and_leave(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(QjaxError, match="cannot be written: Permission denied"):
        open_and_leave(tmp_path / "file")


def test_name_too_long(tmp_path):
    with pytest.raises(QjaxError, match=r"cannot be written: .*File name too long"):
        open_and_leave(tmp_path / ("n" * 300))
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_line(target):
    def write():
        with atomic_file(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(QjaxError, match=r"file\.bin: cannot be written: No space left on device"):
        write()
    assert not list(target.parent.iterdir())


def test_errors_of_the_flush_are_seen(target, monkeypatch):
    """A disk may say that it is full only when the buffer is flushed."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(QjaxError, match="No space left"):
        open_and_leave(target)
    assert not list(target.parent.iterdir())


def test_leftovers_of_this_file_alone_are_removed(target):
    stem = temporary_stem(target)
    mine, others = f"{stem}0123456789abcdef.tmp", (f"{stem}tmp", ".file.bin.0123456789abcdef.tmp", "file.bin")
    for name in (mine, *others):
        (target.parent / name).write_bytes(b"half")
    (target.parent / f"{mine[:-5]}0.tmp").mkdir()
    remove_leftovers(target)
    assert {p.name for p in target.parent.iterdir()} == set(others)


def test_what_cannot_be_written_is_said_before(target):
    check_writable(target)
    assert list(target.parent.iterdir()) == []
    for path in (target.parent, target / "file.bin", "bad\0name"):
        with pytest.raises(QjaxError, match="cannot be written"):
            check_writable(path)
