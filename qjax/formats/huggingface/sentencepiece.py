"""The pieces of a SentencePiece model, `tokenizer.model`.

Only these are read: `ModelProto.pieces` (field 1), each with its text (1), score (2) and type (3), in protobuf's wire
format. Source: src/sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qjax.errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_VARINT, _BYTES, _FIXED32 = 0, 2, 5
# Bytes of the kinds of fixed length.
_FIXED = {1: 8, _FIXED32: 4}


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
    while at < len(data):
        key, at = _varint(data, at, path)
        kind, value = key & 7, None
        if kind == _VARINT:
            value, at = _varint(data, at, path)
        elif kind in _FIXED:
            size = _FIXED[kind]
        elif kind == _BYTES:
            size, at = _varint(data, at, path)
        else:
            raise _damaged(path, at)
        if value is None:
            if size > len(data) - at:
                raise _damaged(path, at)
            value, at = data[at : at + size], at + size
            if kind == _FIXED32:
                (value,) = struct.unpack("<f", value)
        yield key >> 3, value


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    """The number at a position, seven bits a byte, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _damaged(path, at)


def _damaged(path: Path, at: int) -> FormatError:
    return FormatError(f"{path}: expected a SentencePiece model; it is truncated or damaged at byte {at}")
