"""Safetensors files and their index, whole and spoilt: one clear error each."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.formats.huggingface.checkpoint import INDEX, open_checkpoint, read_header

F16 = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}
NEXT = {**F16, "data_offsets": [8, 16]}
Copied = Callable[..., Path]


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_what_is_there(tmp_path: Path) -> None:
    data = np.arange(8, dtype=np.float16)
    write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "b": NEXT, "a": F16}, data.tobytes())
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["b", "a"]
    assert checkpoint.tensors["a"].shape == (2, 2)
    np.testing.assert_array_equal(checkpoint.raw("b").view(np.float16), data[4:])
    checkpoint.release("b")
    np.testing.assert_array_equal(checkpoint.raw("b").view(np.float16), data[4:])


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"a": F16}, 7, "truncated"),
        ({"a": F16, "b": {**F16, "data_offsets": [6, 14]}}, 16, "overlaps"),
        ({"a": {**F16, "shape": [2, 3]}}, 12, "expected 12 bytes"),
        ({"a": {**F16, "data_offsets": [8, 0]}}, 16, "expected 8 bytes"),
        ({"a": {**F16, "data_offsets": [0, 8, 16]}}, 16, "expected 8 bytes"),
        ({"a": {**F16, "shape": [1 << 62, 1 << 62]}}, 16, "expected"),
        ({"a": {**F16, "shape": [-2, -2]}}, 16, "described by"),
        ({"a": {**F16, "shape": [2.0, 2]}}, 16, "described by"),
        ({"a": {**F16, "shape": None}}, 16, "described by"),
        ({"a": [1]}, 16, "described by"),
        ({"a": {**F16, "dtype": "F12"}}, 16, "dtype 'F12'"),
        ([1], 16, "JSON object"),
        (b"{" * 50, 16, "not JSON"),
        (b'{"a":' * 100_000, 16, "not JSON"),
        (b'{"a": {}, "a": {}}', 16, "stands twice"),
        (b"\xff\xfe{}", 16, "not JSON"),
    ],
)
def test_a_spoilt_header(tmp_path: Path, header: Any, size: int, words: str) -> None:
    write(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(QjaxError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 1000, 1 << 40, (1 << 64) - 1])
def test_a_length_that_is_not_true(tmp_path: Path, length: int) -> None:
    write(tmp_path / "model.safetensors", {"a": F16}, bytes(8), length)
    with pytest.raises(QjaxError, match=r"expected a \.safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(QjaxError, match=r"empty|Git LFS|truncated"):
        open_checkpoint(tmp_path)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_read_or_refused(data: bytes, at: int) -> None:
    text = json.dumps({"a": F16, "b": NEXT}).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(16)
    spoilt = whole[:at] + data + whole[at + len(data) :]
    with contextlib.suppress(QjaxError):
        found = read_header(spoilt, Path("model.safetensors"))
        assert all(tensor.offset + tensor.nbytes <= len(spoilt) for tensor in found.values())


def test_shards_and_their_index(copied: Copied, tmp_path: Path) -> None:
    folder = copied("qwen2")
    names = set(open_checkpoint(folder).tensors)
    first, *_, last = sorted(folder.glob("model-*"))
    index = json.loads((folder / INDEX).read_text())

    def refused(weight_map: Any, words: str) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(QjaxError, match=words) as caught:
            open_checkpoint(folder)
        assert str(folder) in str(caught.value)

    shards = index["weight_map"]
    refused({**shards, "model.extra.weight": first.name}, "'model.extra.weight' is missing")
    refused({**shards, "model.extra.weight": "model-9.safetensors"}, "model-9.safetensors: this shard")
    for outside in ("../qwen3/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3, None, "\0"):
        refused({**shards, "model.extra.weight": outside}, "names of .safetensors files beside it")
    refused([], "weight_map")
    refused({}, "weight_map")
    (folder / INDEX).write_text("{")
    with pytest.raises(QjaxError, match="not JSON"):
        open_checkpoint(folder)
    # What no index names is found by the shards' names.
    (folder / INDEX).unlink()
    assert set(open_checkpoint(folder).tensors) == names
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(QjaxError, match="truncated"):
        open_checkpoint(folder)
    last.unlink()
    with pytest.raises(QjaxError, match=f"{last.name}: this shard of the model is missing"):
        open_checkpoint(folder)


def test_other_weights(tmp_path: Path) -> None:
    with pytest.raises(QjaxError, match=r"no model\.safetensors there: save"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(QjaxError, match=r"pytorch_model\.bin is of a format that qjax does not read"):
        open_checkpoint(tmp_path)
