"""Importance matrices in both of llama.cpp's forms, and what is neither."""

import struct
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import FormatError, QjaxWarning
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.imatrix import Importances, merge, read_imatrix, write_imatrix
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


def test_written_as_llama_imatrix_writes_it(interop: Path, tmp_path: Path) -> None:
    """What was read from its file, written again, is its file."""
    theirs = interop / "imatrix.gguf"
    write_imatrix(tmp_path / "i.gguf", read_imatrix(theirs))
    assert (tmp_path / "i.gguf").read_bytes() == theirs.read_bytes()


def some(seed: int, tokens: int, *, columns: int = 3, matrices: tuple[int, ...] = ()) -> Importances:
    """float64 sums that float32 does not hold."""
    rng = np.random.default_rng(seed)
    sums = {"a.weight": rng.uniform(1, 9, (*matrices, columns)), "b.weight": rng.uniform(1, 9, 5)}
    counts = {"a.weight": np.full(matrices, float(tokens)), "b.weight": np.array(float(tokens))}
    return Importances(sums, counts, tokens // 8, 8, (f"{seed}.txt",))


@pytest.mark.parametrize("matrices", [(), (2,)])
def test_comes_back(tmp_path: Path, matrices: tuple[int, ...]) -> None:
    """To the last bit if it is to be gone on with, and rounded to float32 for llama.cpp."""
    path, wrote = tmp_path / "i.gguf", some(1, 16, matrices=matrices)
    for exact, rounded in ((True, np.float64), (False, np.float32)):
        write_imatrix(path, wrote, exact=exact, metadata={"mine": "kept"})
        found = read_imatrix(path)
        assert found[2:] == wrote[2:]
        for name, sums in wrote.sums.items():
            assert found.sums[name].dtype == rounded
            np.testing.assert_array_equal(found.sums[name], sums.astype(rounded))
            np.testing.assert_array_equal(found.counts[name], wrote.counts[name])
            np.testing.assert_allclose(found.of[name], sums / 16, rtol=1e-7)
    assert open_gguf(path).metadata["mine"] == "kept"


def test_merge(tmp_path: Path) -> None:
    first, second = some(1, 16), some(2, 48)
    both = merge([first, second], chunk_size=8)
    assert (both.chunks, both.chunk_size, both.datasets) == (8, 8, ("1.txt", "2.txt"))
    assert both.counts["a.weight"] == 64
    np.testing.assert_array_equal(both.sums["a.weight"], first.sums["a.weight"] + second.sums["a.weight"])
    # A .dat file counts chunks: two of its kind and of this size weigh as much as 16 tokens.
    (tmp_path / "i.dat").write_bytes(dat(b"a.weight", 2))
    old = merge([first, read_imatrix(tmp_path / "i.dat")], chunk_size=8)
    assert old.counts["a.weight"] == 32
    np.testing.assert_allclose(old.of["a.weight"], (first.sums["a.weight"] + 8 * SUMS) / 32, rtol=1e-6)
    with pytest.raises(FormatError, match=r"a\.weight.*two models"):
        merge([first, some(1, 16, columns=4)], chunk_size=8)
