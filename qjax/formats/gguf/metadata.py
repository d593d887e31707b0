"""The key-value part of a GGUF header: typed values to Python and back.

A value is a number, a bool, a string, or an array of one of these. Arrays are decoded when they are first
asked for: a vocabulary with its merges is most of a header, and many callers never look at it.

Source: ggml/docs/gguf.md (`gguf_metadata_value_t`). Arrays of arrays are refused, as ggml/src/gguf.cpp does.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.gguf.cursor import DAMAGED, Cursor, read_strings, shown


@dataclass(frozen=True)
class ValueType:
    """A type of a metadata value, or of an array's items. `format` is struct's letter, "" for strings."""

    name: str
    id: int
    format: str

    @property
    def size(self) -> int:
        """Bytes of one item: exact for numbers, the least possible (its length field) for strings."""
        return struct.calcsize(self.format) if self.format else 8

    @property
    def dtype(self) -> np.dtype:
        """numpy's little-endian type of a number."""
        return np.dtype("<" + {"?": "u1", "b": "i1", "B": "u1"}.get(self.format, self.format))


# Named as llama.cpp prints them. The id of an array itself is 9.
ARRAY_ID = 9
_VALUE_TYPES = (
    ValueType("u8", 0, "B"),
    ValueType("i8", 1, "b"),
    ValueType("u16", 2, "H"),
    ValueType("i16", 3, "h"),
    ValueType("u32", 4, "I"),
    ValueType("i32", 5, "i"),
    ValueType("f32", 6, "f"),
    ValueType("bool", 7, "?"),
    ValueType("str", 8, ""),
    ValueType("u64", 10, "Q"),
    ValueType("i64", 11, "q"),
    ValueType("f64", 12, "d"),
)
VALUE_TYPES: Mapping[str, ValueType] = {t.name: t for t in _VALUE_TYPES}
_BY_ID = {t.id: t for t in _VALUE_TYPES}


@dataclass(frozen=True, slots=True)
class _Array:
    """An array that still lies in the file: `count` items from byte `position`."""

    item: ValueType
    count: int
    position: int


class Metadata(Mapping[str, Any]):
    """The metadata of one file in its order; arrays are decoded when first asked for, then kept.

    Values are int, float, bool, str; arrays are read-only numpy arrays of their own type, or list[str].
    """

    def __init__(self, data: mmap.mmap | bytes, entries: dict[str, Any]) -> None:
        self._data = data
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        if isinstance(value, _Array):
            value = self._entries[key] = _read_array(self._data, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        return f"Metadata({len(self._entries)} keys)"


def read_metadata(cursor: Cursor, count: int) -> tuple[Metadata, dict[str, str]]:
    """Read `count` keys with their values; also returns each value's type: "u32", "str", "arr[i32]", ...

    Raises:
        FormatError: a length or count exceeds the file, a key is double or not UTF-8, a type is unknown.
        UnsupportedError: an array of arrays.
    """
    # A key takes 8 bytes of length, 4 of type and a value of 1 byte or more.
    if count > cursor.left // 13:
        cursor.fail(f"the header claims {count} metadata keys, but only {cursor.left} bytes follow: {DAMAGED}")
    entries: dict[str, Any] = {}
    types: dict[str, str] = {}
    for index in range(count):
        key = cursor.name(f"metadata key {index}")
        what = f"metadata {shown(key)}"
        if key in entries:
            cursor.fail(f"{what} stands twice in the header: {DAMAGED}")
        type_id = cursor.u32(what)
        if type_id == ARRAY_ID:
            array = _skip_array(cursor, what)
            entries[key], types[key] = array, f"arr[{array.item.name}]"
        else:
            entries[key] = _read_scalar(cursor, _value_type(cursor, type_id, what), what)
            types[key] = _BY_ID[type_id].name
    return Metadata(cursor.data, entries), types


def _value_type(cursor: Cursor, type_id: int, what: str) -> ValueType:
    if type_id not in _BY_ID:
        cursor.fail(f"{what} has the unknown value type {type_id}, expected 0 to 12: {DAMAGED}")
    return _BY_ID[type_id]


def _read_scalar(cursor: Cursor, kind: ValueType, what: str) -> int | float | bool | str:
    if not kind.format:
        # Text for people and templates: what is no UTF-8 in it becomes U+FFFD, so that it can be printed.
        return cursor.string_bytes(what).decode("utf-8", "replace")
    return struct.unpack_from("<" + kind.format, cursor.data, cursor.skip(kind.size, what))[0]


def _skip_array(cursor: Cursor, what: str) -> _Array:
    item_id = cursor.u32(what)
    if item_id == ARRAY_ID:
        raise UnsupportedError(f"{cursor.path}: {what} is an array of arrays, which neither llama.cpp nor qjax reads")
    item = _value_type(cursor, item_id, what)
    count = cursor.u64(what)
    if item.format:
        position = cursor.skip(count * item.size, f"{what}, an array of {count} {item.name},")
    else:
        position = cursor.skip_strings(count, what)
    return _Array(item, count, position)


def _read_array(data: mmap.mmap | bytes, array: _Array) -> np.ndarray | list[str]:
    if not array.item.format:
        return read_strings(data, array.position, array.count)
    values = np.frombuffer(data, array.item.dtype, array.count, array.position)
    values = values != 0 if array.item.name == "bool" else values.copy()
    values.flags.writeable = False
    return values


def encode_value(key: str, value: Any, type_name: str | None = None) -> bytes:
    """One metadata entry as it stands in a file: key, type, value.

    Args:
        key: the entry's name.
        value: int, float, bool, str, a numpy scalar, a 1-D numpy array, or a sequence of numbers or strings.
        type_name: such as "u16" or "arr[f32]"; without it the value decides: int is u32 (i32 if negative, u64
            or i64 if it is too large), float is f32, lists of ints are i32, numpy values keep their own type.

    Raises:
        FormatError: the value has no GGUF type, or does not fit `type_name`.
    """
    if type_name is None:
        type_name = _type_name_for(key, value)
    item = VALUE_TYPES.get(type_name.removeprefix("arr[").removesuffix("]"))
    if item is None:
        raise FormatError(f"metadata {shown(key)}: unknown value type {type_name!r}, expected {', '.join(VALUE_TYPES)}")
    is_array = type_name.startswith("arr[")
    values = value if is_array else [value]
    try:
        body = _encode_items(values, item)
    except (struct.error, OverflowError, TypeError, ValueError) as error:
        raise FormatError(f"metadata {shown(key)}: the value does not fit its type {type_name} ({error})") from error
    head = encode_name(key)
    if not is_array:
        return head + struct.pack("<I", item.id) + body
    return head + struct.pack("<IIQ", ARRAY_ID, item.id, len(values)) + body


def encode_name(name: str) -> bytes:
    """The name of a key or tensor as GGUF stores it: u64 length, then UTF-8.

    Raises:
        FormatError: the name has lone surrogates, which UTF-8 cannot hold.
    """
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"the name {shown(name)} cannot be written as UTF-8") from error
    return struct.pack("<Q", len(raw)) + raw


def _encode_items(values: Any, item: ValueType) -> bytes:
    """A run of values of one type; ValueError, TypeError or struct.error where one of them does not fit."""
    if isinstance(values, str) or (isinstance(values, np.ndarray) and values.ndim != 1):
        raise ValueError("expected a flat array")
    if not item.format:
        # Raw bytes that the reader kept as lone surrogates go back to what they were.
        raw = [str.encode(text, "utf-8", "surrogateescape") for text in values]
        return b"".join(struct.pack("<Q", len(text)) + text for text in raw)
    if isinstance(values, np.ndarray):
        with np.errstate(invalid="ignore", over="ignore"):
            converted = values.astype(item.dtype)
        if item.format not in "fd" and not np.array_equal(converted, values):
            raise ValueError("a number is out of range")
        return converted.tobytes()
    if item.name == "bool" and not all(isinstance(v, bool | np.bool_) for v in values):
        raise ValueError("expected bools")
    return struct.pack(f"<{len(values)}{item.format}", *values)


_NUMPY_NAMES = {"bool": "bool", "float32": "f32", "float64": "f64"} | {
    f"{sign}int{bits}": f"{letter}{bits}" for sign, letter in (("", "i"), ("u", "u")) for bits in (8, 16, 32, 64)
}


def _type_name_for(key: str, value: Any) -> str:
    """The type that fits a value best where none is known."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.name in _NUMPY_NAMES:
        name = _NUMPY_NAMES[value.dtype.name]
        if value.ndim <= 1:
            return f"arr[{name}]" if value.ndim else name
    elif isinstance(value, bool | float | str):
        return {bool: "bool", float: "f32", str: "str"}[type(value)]
    elif isinstance(value, int):
        return _integer_type(value, value, ("u32", "i32", "u64", "i64"))
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        if all(isinstance(v, str) for v in value):
            return "arr[str]"
        if all(isinstance(v, bool) for v in value):
            return "arr[bool]"
        if all(isinstance(v, int) for v in value):
            return f"arr[{_integer_type(min(value), max(value), ('i32', 'u32', 'i64', 'u64'))}]"
        if all(isinstance(v, int | float) for v in value):
            return "arr[f32]"
    raise FormatError(
        f"metadata {shown(key)}: a {type(value).__name__} has no GGUF type, "
        "expected int, float, bool, str, or a flat array of one of them"
    )


def _integer_type(low: int, high: int, names: tuple[str, ...]) -> str:
    """The first of `names` that holds both; the last one where none does (encoding then says so)."""
    for name in names:
        info = np.iinfo(VALUE_TYPES[name].dtype)
        if info.min <= low and high <= info.max:
            return name
    return names[-1]
