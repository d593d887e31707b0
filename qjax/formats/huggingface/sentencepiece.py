"""The pieces of a SentencePiece model, `tokenizer.model`.

Only these are read: `ModelProto.pieces` (field 1), each with its text (1), score (2) and type (3), in protobuf's wire
format. Source: src/sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from qjax.errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """text: bytes that are no UTF-8 as lone surrogates. score: of a merge to it. kind: one of the six types above."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """All pieces in the order of their ids.

    Raises:
        FormatError: the file cannot be read, or is no SentencePiece model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    pieces = [_piece(value, path) for field, value in _fields(data, path) if field == 1 and isinstance(value, bytes)]
    if not pieces:
        raise FormatError(f"{path}: expected a SentencePiece model, found no pieces in it")
    return pieces


def _piece(data: bytes, path: Path) -> Piece:
    found = dict(_fields(data, path))
    text, score, kind = found.get(1, b""), found.get(2, 0.0), found.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, float) or kind not in range(1, 7):
        raise FormatError(f"{path}: a piece of the SentencePiece model is damaged: download the file again")
    return Piece(text.decode("utf-8", "surrogateescape"), score, int(kind))


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field of a message: varints as int, 32-bit ones as float, all else as bytes."""
    at = 0

    def fail() -> NoReturn:
        raise FormatError(f"{path}: expected a SentencePiece model; it is truncated or damaged at byte {at}")

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            if at >= len(data):
                fail()
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        fail()

    def some(count: int) -> bytes:
        nonlocal at
        if count > len(data) - at:
            fail()
        at += count
        return data[at - count : at]

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == _VARINT:
            yield key >> 3, varint()
        elif kind == _FIXED32:
            yield key >> 3, struct.unpack("<f", some(4))[0]
        elif kind == _BYTES:
            yield key >> 3, some(varint())
        elif kind == _FIXED64:
            yield key >> 3, some(8)
        else:
            fail()
