"""A reading position in a GGUF header that never passes the end of the file.

Nothing is allocated by a length that the header claims before that length has been compared with the bytes
that are left, so a hostile file of n bytes costs memory in the order of n.
"""

import mmap
import struct
from pathlib import Path
from typing import NoReturn

from qjax.errors import FormatError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

DAMAGED = "the file is truncated or damaged"


def shown(name: str) -> str:
    """A name from a file, quoted for a one-line message: control characters escaped, cut at 80 characters."""
    return repr(name) if len(name) <= 80 else repr(name[:77]) + "..."


class Cursor:
    """Reads little-endian numbers and length-prefixed strings of `data` from `position` on."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes between the position and the end of the file."""
        return self.size - self.position

    def fail(self, problem: str) -> NoReturn:
        """Raise FormatError for this file."""
        raise FormatError(f"{self.path}: {problem}")

    def need(self, count: int, what: str) -> None:
        """Refuse to go on unless `count` bytes are left for `what`."""
        if count > self.left:
            self.fail(f"{what} needs {count} bytes at offset {self.position}, found {self.left}: {DAMAGED}")

    def skip(self, count: int, what: str) -> int:
        """Pass over `count` bytes; returns the position they start at."""
        self.need(count, what)
        start = self.position
        self.position += count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.skip(8, what))[0]

    def string_bytes(self, what: str) -> bytes:
        """The bytes of a string: u64 length, then that many bytes."""
        length = self.u64(f"the length of {what}")
        start = self.skip(length, what)
        return self.data[start : start + length]

    def name(self, what: str) -> str:
        """A string that names something (a key, a tensor), and so has to be UTF-8."""
        raw = self.string_bytes(what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8, found {raw[:40]!r}: {DAMAGED}")

    def skip_strings(self, count: int, what: str) -> int:
        """Pass over `count` strings (vocabularies hold hundreds of thousands); returns where they start."""
        self.need(8 * count, f"{what} of {count} strings")
        data, unpack, last = self.data, _U64.unpack_from, self.size - 8
        start = position = self.position
        for _ in range(count):
            if position > last:
                self.fail(f"{what} of {count} strings reaches past the end of the file: {DAMAGED}")
            position += 8 + unpack(data, position)[0]
        if position > self.size:
            self.fail(f"{what} of {count} strings reaches past the end of the file: {DAMAGED}")
        self.position = position
        return start


def read_strings(data: mmap.mmap | bytes, position: int, count: int) -> list[str]:
    """`count` strings from `position`, a run that `Cursor.skip_strings` has checked.

    Some vocabularies hold tokens that are no UTF-8 (single raw bytes). Those bytes become the lone surrogates
    U+DC80..U+DCFF ("surrogateescape"), so that writing the strings back gives the same bytes.
    """
    unpack = _U64.unpack_from
    strings = []
    for _ in range(count):
        start = position + 8
        position = start + unpack(data, position)[0]
        strings.append(data[start:position].decode("utf-8", "surrogateescape"))
    return strings
