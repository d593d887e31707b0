"""Metadata values to bytes: the types that are chosen, the values that are refused."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import FormatError
from qjax.formats.gguf.container import open_gguf
from qjax.formats.gguf.metadata import VALUE_TYPES, encode_value
from qjax.formats.gguf.writer import write_gguf


def test_types_are_those_of_gguf_py():
    names = {"str": "STRING", "bool": "BOOL"}
    for name, kind in VALUE_TYPES.items():
        theirs = names.get(name) or name.replace("u", "UINT").replace("i", "INT").replace("f", "FLOAT")
        assert gguf.GGUFValueType[theirs].value == kind.id


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "bool"),
        (7, "u32"),
        (-7, "i32"),
        (2**32, "u64"),
        (-(2**32), "i64"),
        (0.5, "f32"),
        ("text", "str"),
        (np.uint16(3), "u16"),
        (np.int8(-3), "i8"),
        (np.float64(0.5), "f64"),
        (np.bool_(True), "bool"),
        (np.array([1, 2], np.uint8), "arr[u8]"),
        (np.array([True, False]), "arr[bool]"),
        (np.array([0.5], np.float32), "arr[f32]"),
        ([1, -2], "arr[i32]"),
        ([1, 2**31], "arr[u32]"),
        ([-1, 2**31], "arr[i64]"),
        ((0.5, 1), "arr[f32]"),
        ([True, False], "arr[bool]"),
        (["a", "b"], "arr[str]"),
        ([], "arr[str]"),
    ],
)
def test_the_value_chooses_its_type(tmp_path, value, expected):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"key": value}, [])
    file = open_gguf(path)
    assert file.metadata_types["key"] == expected
    assert np.array_equal(file.metadata["key"], value)
    field = gguf.GGUFReader(path).fields["key"]
    if expected != "arr[str]" or value:  # gguf-py has no contents for an empty array
        assert np.array_equal(field.contents(), value)


@pytest.mark.parametrize("name", sorted(VALUE_TYPES))
@given(data=st.data())
def test_every_type_comes_back(tmp_path_factory, name, data):
    kind = VALUE_TYPES[name]
    if name == "str":
        values = st.text()
    elif name == "bool":
        values = st.booleans()
    elif kind.format in "fd":
        values = st.floats(width=32 if name == "f32" else 64, allow_nan=False)
    else:
        info = np.iinfo(kind.dtype)
        values = st.integers(int(info.min), int(info.max))
    array = data.draw(st.lists(values, max_size=5))
    scalar = data.draw(values)
    path = tmp_path_factory.mktemp("values") / "m.gguf"
    types = {"scalar": name, "array": f"arr[{name}]"}
    write_gguf(path, {"scalar": scalar, "array": array}, [], metadata_types=types)
    file = open_gguf(path)
    assert file.metadata_types == types
    assert file.metadata["scalar"] == scalar
    assert list(file.metadata["array"]) == array
    assert isinstance(file.metadata["array"], list if name == "str" else np.ndarray)
    again = path.with_name("again.gguf")
    write_gguf(again, file.metadata, [], metadata_types=file.metadata_types)
    assert again.read_bytes() == path.read_bytes()


def test_bytes_of_tokens_survive():
    token = b"x\xff".decode("utf-8", "surrogateescape")
    assert encode_value("k", [token]).endswith(b"\x02" + bytes(7) + b"x\xff")


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (300, "u8"),
        (-1, "u32"),
        (2**64, None),
        (1e300, "f32"),
        (0.5, "i32"),
        ("text", "u32"),
        (1, "str"),
        (1, "bool"),
        (None, "bool"),
        ("text", "arr[str]"),
        (5, "arr[i32]"),
        ([1, "a"], "arr[i32]"),
        ([1, 300], "arr[u8]"),
        (["a", 1], "arr[str]"),
        ([1, 0], "arr[bool]"),
        (np.array([1, 300]), "arr[u8]"),
        (np.array([0.5, np.nan]), "arr[i32]"),
        (np.zeros((2, 2), np.int32), "arr[i32]"),
        ([[1], [2]], "arr[i32]"),
        (["\ud800"], "arr[str]"),
    ],
)
def test_a_value_that_does_not_fit(value, type_name):
    with pytest.raises(FormatError, match=r"metadata 'some\.key': the value does not fit its type"):
        encode_value("some.key", value, type_name)


@pytest.mark.parametrize(
    "value", [None, {}, b"bytes", [1, "a"], [None], np.zeros(2, np.float16), np.zeros((2, 2), np.int32), 1j]
)
def test_a_value_without_type(value):
    with pytest.raises(FormatError, match=r"metadata 'some\.key': a .* has no GGUF type"):
        encode_value("some.key", value)


def test_unknown_type_name():
    with pytest.raises(FormatError, match="unknown value type 'u128', expected u8, i8"):
        encode_value("some.key", 1, "u128")


def test_name_that_is_no_text():
    with pytest.raises(FormatError, match=r"the name '\\ud800' cannot be written"):
        encode_value("\ud800", 1)
