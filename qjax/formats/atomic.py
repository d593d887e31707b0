"""Write a file so that it appears whole or not at all.

The bytes go to a temporary file in the same folder, which is flushed to the disk and then renamed over the
target: readers see the old file or the new one, and a memory map of the old one stays valid.
"""

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qjax.errors import QjaxError

# What a full or read-only disk says while the file is being filled.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only when the block ends without an exception.

    Whatever ends the block otherwise, Ctrl-C included, removes the temporary file and leaves what stood at
    `path`. A symbolic link is followed; an existing file's permissions are kept.

    Args:
        path: the file to make or replace; its folder must exist.

    Yields:
        The temporary file, open for writing and seeking.

    Raises:
        QjaxError: the folder is missing, `path` is a directory, or the disk refuses.
    """
    target = checked_target(path)
    temporary = target.with_name(f"{temporary_stem(target)}{secrets.token_hex(8)}.tmp")
    try:
        with refusals(path, temporary):
            with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            install(temporary, target)
    finally:
        # After the rename there is nothing left of this name.
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def check_writable(path: str | Path) -> None:
    """Say before a long computation what `atomic_file` would say after it.

    Raises:
        QjaxError: see `atomic_file`.
    """
    folder = checked_target(path).parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise QjaxError(f"{path}: cannot be written: {error.strerror}") from error


def remove_leftovers(path: str | Path) -> None:
    """Remove what processes left that were killed while they wrote this file; none may be writing it now."""
    target = Path(os.path.realpath(path))
    for entry in target.parent.glob(f"{glob.escape(temporary_stem(target))}{'[0-9a-f]' * 16}.tmp"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def temporary_stem(target: Path) -> str:
    """How the names of a file's temporary ones begin, cut so that they stay within what file systems allow."""
    key = hashlib.blake2b(os.fsencode(target.name), digest_size=4).hexdigest()
    return f".{target.name[:40]}.{key}."


@contextlib.contextmanager
def refusals(path: str | Path, temporary: Path) -> Iterator[None]:
    """Say in one line what the disk or folder refuses to `temporary`, a file or folder on its way to `path`.

    Raises:
        QjaxError: in place of such an OSError; others, of the files that are read meanwhile, pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS or Path(str(error.filename)).is_relative_to(temporary):
            raise QjaxError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def install(temporary: Path, target: Path) -> None:
    """Rename a finished file over `target`, whose permissions it takes if there is one."""
    if target.exists():
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))
    temporary.replace(target)


def checked_target(path: str | Path) -> Path:
    """Where the file will really lie, behind symbolic links; QjaxError if no file can lie there."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise QjaxError(f"{path}: cannot be written, it is a directory: name a file in it")
        if not target.parent.is_dir():
            raise QjaxError(f"{path}: cannot be written, there is no folder {target.parent}: make it first")
    except (OSError, ValueError) as error:
        raise QjaxError(f"{path}: cannot be written: {error}") from error
    return target


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
