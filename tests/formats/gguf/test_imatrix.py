"""Importance matrices in both of llama.cpp's forms, and what is neither."""

import struct
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import FormatError, QjaxWarning
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.writer import TensorToWrite, write_gguf

SUMS = np.array([2.0, 4.0, 0.0], np.float32)


def floats(name: str, values: np.ndarray) -> TensorToWrite:
    return TensorToWrite(name, values.shape, "F32", np.ascontiguousarray(values, np.float32).view(np.uint8))


def gguf_file(path: Path, *tensors: TensorToWrite, kind: str = "imatrix") -> Path:
    metadata = {"general.type": kind, "imatrix.chunk_count": 7, "imatrix.datasets": ["a.txt"]}
    write_gguf(path, metadata, tensors)
    return path


def test_gguf(tmp_path: Path) -> None:
    path = gguf_file(
        tmp_path / "i.gguf",
        floats("blk.0.ffn_up.weight.in_sum2", SUMS[None]),
        floats("blk.0.ffn_up.weight.counts", np.array([[2.0]])),
        floats("never.weight.in_sum2", SUMS[None]),
        floats("never.weight.counts", np.array([[0.0]])),
    )
    found = read_imatrix(path)
    assert (found.chunks, found.datasets, set(found.of)) == (7, ("a.txt",), {"blk.0.ffn_up.weight"})
    np.testing.assert_array_equal(found.of["blk.0.ffn_up.weight"], [1, 2, 0])


def test_experts(tmp_path: Path) -> None:
    """As llama-quantize has it: sums by each expert's count; all columns alike of one that was never asked."""
    path = gguf_file(
        tmp_path / "i.gguf",
        floats("up.weight.in_sum2", np.stack([SUMS, SUMS])),
        floats("up.weight.counts", np.array([[4.0], [0.0]])),
    )
    with pytest.warns(QjaxWarning, match=r"no token was sent to 1 matrices of experts, e\.g\. 1 of up\.weight"):
        found = read_imatrix(path)
    expected = np.array([[0.5, 1, 0], [1, 1, 1]], np.float32)
    np.testing.assert_array_equal(found.matched(path, {"up.weight": (2, 5, 3)})["up.weight"], expected)
    # The older form has them in one row.
    (tmp_path / "i.dat").write_bytes(dat(b"up.weight", 1, expected.reshape(-1)))
    older = read_imatrix(tmp_path / "i.dat")
    np.testing.assert_array_equal(older.matched(path, {"up.weight": (2, 5, 3)})["up.weight"], expected)
    for shape in ((3, 5, 3), (5, 3), (2, 5, 4)):
        with pytest.raises(FormatError, match=r"up\.weight of shape .* columns.* another model"):
            found.matched(path, {"up.weight": shape})


def dat(name: bytes = b"w", calls: int = 4, values: np.ndarray = SUMS) -> bytes:
    head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", calls, values.size)
    return head + values.tobytes() + struct.pack("<ii", 9, 5) + b"a.txt"


def test_dat(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat())
    found = read_imatrix(path)
    assert (found.chunks, found.datasets) == (9, ("a.txt",))
    np.testing.assert_array_equal(found.of["w"], [0.5, 1, 0])


@pytest.mark.parametrize("cut", range(len(dat()) - 14))
def test_dat_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat()[:cut])
    with pytest.raises(FormatError, match=r"i\.dat"):
        read_imatrix(path)


@pytest.mark.parametrize(
    "data", [dat(values=np.array([np.nan], np.float32)), dat(values=-SUMS), struct.pack("<ii", 1, 1 << 30), b"GGUF"]
)
def test_refuses(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"i\.dat"):
        read_imatrix(path)


def test_refuses_other_gguf_files(tmp_path: Path) -> None:
    counts = floats("w.counts", np.array([[1.0, 2.0]]))
    for path in (
        gguf_file(tmp_path / "model.gguf", floats("w", SUMS), kind="model"),
        gguf_file(tmp_path / "empty.gguf", floats("w", SUMS)),
        gguf_file(tmp_path / "alone.gguf", floats("w.in_sum2", SUMS)),
        gguf_file(tmp_path / "counts.gguf", floats("w.in_sum2", SUMS), counts),
    ):
        with pytest.raises(FormatError, match=path.name):
            read_imatrix(path)
    with pytest.raises(FormatError, match="nowhere"):
        read_imatrix(tmp_path / "nowhere.gguf")
