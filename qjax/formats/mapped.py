"""Files by memory map: nothing is read before it is used, and what was used can be let go."""

import mmap
import stat
from pathlib import Path

from qjax.errors import FormatError


def map_file(path: Path, what: str) -> mmap.mmap:
    """Map a whole file for reading; `what` it should be, such as "a GGUF file", is said in errors.

    Raises:
        FormatError: missing, empty, a directory, no regular file, or not readable.
    """
    try:
        mode = path.stat()
        if stat.S_ISDIR(mode.st_mode):
            raise FormatError(f"{path}: this is a directory, expected {what}: name the file in it")
        if not stat.S_ISREG(mode.st_mode):
            raise FormatError(f"{path}: this is no regular file, expected {what}")
        if mode.st_size == 0:
            raise FormatError(f"{path}: the file is empty, expected {what}: download or make it again")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error


def drop_pages(mapped: mmap.mmap, offset: int, nbytes: int) -> None:
    """Drop these bytes' pages from this process's memory; views stay valid and read them again."""
    # Not every system has madvise; without it the system drops the pages when it needs memory.
    if hasattr(mmap, "MADV_DONTNEED"):
        start = offset - offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)
