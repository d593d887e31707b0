"""qjax's own files: every family comes back bit for bit, and what is damaged is refused in one line."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.arrays import TransformedArray, affine
from qjax.errors import FormatError, QjaxError
from qjax.formats.gguf import from_blocks
from qjax.formats.gguf.arrays import BLOCK_TYPES, RAW_TYPES
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.huggingface.checkpoint import read_header
from qjax.formats.huggingface.native import read_arrays, read_facts, write_arrays
from qjax.kernels.layout import lay_out


def random_blocks(kind: str, rows: int = 16, columns: int = 512) -> Any:
    size = GGML_TYPES[kind].row_bytes(columns)
    raw = np.random.default_rng(len(kind)).integers(0, 256, (rows, size)).astype(np.uint8)
    return from_blocks(kind, raw, np.asarray)


def same(a: Any, b: Any) -> None:
    """Equal to the bit, floats that are no numbers included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES) + sorted(RAW_TYPES))
def test_every_type_of_gguf_comes_back(tmp_path: Path, kind: str) -> None:
    array = random_blocks(kind)
    write_arrays(tmp_path / "a.safetensors", {"w": array, "of jax": jax.tree.map(jnp.asarray, array)})
    found = read_arrays(tmp_path / "a.safetensors")
    assert list(found) == ["w", "of jax"]
    same(found["w"], array)
    same(found["of jax"], array)


def test_what_lies_in_lanes_comes_back_plain(tmp_path: Path) -> None:
    array = random_blocks("Q4_K")
    write_arrays(tmp_path / "a", {"w": lay_out("w", array)})
    same(read_arrays(tmp_path / "a")["w"], array)


def transformed() -> TransformedArray:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (4, 32)).astype(np.uint8)
    inner = affine(codes, rng.uniform(0, 1, (4, 2)).astype(np.float16), codes[:, :2], 3)
    scales = rng.uniform(1, 2, 32).astype(np.float32)
    return TransformedArray(inner, rng.permutation(32).astype(np.int32), scales, np.float32(0.5) * np.ones(()), "int8")


def test_transformed_and_plain_arrays_and_facts(tmp_path: Path) -> None:
    arrays = {
        "w": transformed(),
        "blk.0.attn_norm.weight": np.arange(3, dtype=np.float32),
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "bytes": np.arange(3, dtype=np.uint8),
        "scalar": np.asarray(7, np.int32),
        "none": np.zeros((0, 4), np.float16),
    }
    write_arrays(tmp_path / "a", arrays, {"block": "3", "method": "GPTQ()"})
    found = read_arrays(tmp_path / "a")
    assert found.keys() == arrays.keys()
    for name in arrays:
        same(found[name], arrays[name])
    facts = read_facts(tmp_path / "a")
    assert (facts["block"], facts["method"]) == ("3", "GPTQ()")
    write_arrays(tmp_path / "b", arrays, {"block": "3", "method": "GPTQ()"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def spoil(path: Path, change: Any) -> None:
    """Write a file anew with `change(description of "w", header)` done to its header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = json.loads(header["__metadata__"]["qjax"])
    change(entries["w"], header)
    header["__metadata__"]["qjax"] = json.dumps(entries)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, h: w.update(family="Path"), "family is 'Path'"),
        (lambda w, h: w.pop("family"), "family is 'None'"),
        (lambda w, h: w.update(extra=1), "expected the fields"),
        (lambda w, h: w.pop("columns"), "expected the fields"),
        (lambda w, h: w.update(columns="gone"), "'gone' is missing"),
        (lambda w, h: w.update(columns=3), "expected names of tensors"),
        (lambda w, h: w.update(columns="w/input_scale"), "stand for"),
        (lambda w, h: w.update(rounding={"a": 1}), "do not fit: rounding"),
        (lambda w, h: w["inner"].update(layout=[[2, 0], [1, 0]]), "do not fit"),
        (lambda w, h: w["inner"].update(layout=[[16, 2], [1, 4]]), "do not fit"),
        (lambda w, h: w["inner"].update(layout="x"), "do not fit"),
        (lambda w, h: w["inner"].update(offset="x"), "do not fit"),
        (lambda w, h: w["inner"].update(planes="w/inner/scale"), "do not fit"),
        (lambda w, h: w["inner"].update(scale=None), "do not fit"),
        (lambda w, h: w["inner"].update(inner=dict(w["inner"])), "expected the fields"),
        (lambda w, h: w.update(inner={**w}), "family"),
        (lambda w, h: h["__metadata__"].update(qjax_version="9"), "another version"),
        (lambda w, h: h["__metadata__"].update(other=3), "expected texts"),
        (lambda w, h: h.pop("w/columns"), "'w/columns' is missing"),
    ],
)
def test_a_description_that_is_not_true(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"w": transformed()})
    spoil(path, change)
    with pytest.raises(FormatError, match=words) as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value)


def test_columns_that_are_taken_twice(tmp_path: Path) -> None:
    array = transformed()
    write_arrays(tmp_path / "a", {"w": array.replace(columns=array.columns * 0)})  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FormatError, match=r"^w: its tensors"):
        read_arrays(tmp_path / "a")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=4))
def test_any_bytes_are_read_or_refused(tmp_path: Path, at: int, data: bytes) -> None:
    path = tmp_path / "whole"
    if not path.exists():
        write_arrays(path, {"w": transformed()})
    whole = path.read_bytes()
    (tmp_path / "spoilt").write_bytes(whole[:at] + data + whole[at + len(data) :])
    with contextlib.suppress(QjaxError):
        read_arrays(tmp_path / "spoilt")


def test_tensors_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", {"w": transformed(), "odd": np.zeros(3, np.uint8), "f": np.zeros(3, np.float32)})
    tensors = read_header((tmp_path / "a").read_bytes(), tmp_path / "a")
    sizes = {"F32": 4, "I32": 4, "F16": 2}
    assert all(t.offset % sizes.get(t.dtype, 1) == 0 for t in tensors.values())
