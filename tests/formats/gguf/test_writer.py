"""Writing: gguf-py reads it back, llama.cpp's files come out byte for byte, failures leave nothing behind."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats.gguf.container import open_gguf
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.pieces import Resume


def copy(source, target):
    """Write everything that `source` holds to `target`."""
    file = open_gguf(source)
    tensors = (TensorToWrite(t.name, t.shape, t.type, lambda n=t.name: file.raw(n)) for t in file.tensors.values())
    return write_gguf(target, file.metadata, tensors, metadata_types=file.metadata_types)


def as_bytes(array):
    return np.frombuffer(array.tobytes(), np.uint8)


@given(st.lists(st.sampled_from(sorted(GGML_TYPES)), max_size=6), st.sampled_from([8, 32, 256]), st.randoms())
def test_gguf_py_reads_what_we_write(tmp_path_factory, types, alignment, random):
    path = tmp_path_factory.mktemp("written") / "m.gguf"
    tensors = []
    for index, name in enumerate(types):
        kind = GGML_TYPES[name]
        shape = (
            *[random.randint(1, 3) for _ in range(random.randint(0, 3))],
            kind.block_size * random.randint(1, 2),
        )
        size = int(np.prod(shape)) // kind.block_size * kind.block_bytes
        data = np.frombuffer(random.randbytes(size), np.uint8)
        tensors.append(TensorToWrite(f"t{index}", shape, name, data))
    metadata = {"general.architecture": "llama", "general.alignment": alignment, "x.list": ["a", "b"]}
    assert write_gguf(path, metadata, tensors) == [path]
    ours = open_gguf(path)
    assert list(ours.tensors) == [t.name for t in tensors]
    assert all(ours.raw(t.name).tobytes() == t.data.tobytes() for t in tensors)
    if "Q2_0" in types:  # unknown to gguf-py 0.19
        return
    reader = gguf.GGUFReader(path)
    assert reader.alignment == alignment
    assert reader.fields["x.list"].contents() == ["a", "b"]
    for written, read in zip(tensors, reader.tensors, strict=True):
        assert read.name == written.name
        assert tuple(read.shape.tolist()[::-1]) == written.shape
        assert read.tensor_type.name == written.type
        assert read.data.tobytes() == written.data.tobytes()


def test_files_of_llama_cpp_come_out_identical(interop, tmp_path):
    files = sorted(interop.glob("*.gguf"))
    assert files
    for path in files:
        copy(path, tmp_path / "copy.gguf")
        assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes(), path.name


def test_vocabularies_come_out_identical(vocab_folder, tmp_path):
    """gguf-py does not pad a file without tensors; ours is padded as llama.cpp does."""
    for path in sorted(vocab_folder.glob("*.gguf")):
        copy(path, tmp_path / "copy.gguf")
        original = path.read_bytes()
        assert (tmp_path / "copy.gguf").read_bytes() == original + bytes(-len(original) % 32), path.name


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.gguf"
    tensors = [TensorToWrite(f"t{n}", (2, 8), "F32", as_bytes(np.full((2, 8), n, np.float32))) for n in range(3)]
    write_gguf(path, {"general.architecture": "llama", "n": 1}, tensors)
    return path


def test_one_tensor_at_a_time(tmp_path):
    """The data of a tensor are made only when its turn comes, after those before it are written."""
    alive, most = [], []

    def make():
        alive.append(1)
        most.append(len(alive))
        data = np.zeros(4096, np.uint8)
        alive.pop()
        return data

    write_gguf(tmp_path / "m.gguf", {}, [TensorToWrite(str(n), (1024,), "F32", make) for n in range(5)])
    assert most == [1] * 5


def test_onto_the_file_that_is_being_read(small):
    """The rename leaves the old map as it was, so a file can be rewritten in place."""
    before = small.read_bytes()
    file = open_gguf(small)
    view = file.raw("t2")
    reordered = [TensorToWrite(n, (2, 8), "F32", file.raw(n)[::-1]) for n in ("t2", "t1", "t0")]
    write_gguf(small, file.metadata, reordered, metadata_types=file.metadata_types)
    assert small.read_bytes() != before
    assert view.view(np.float32).tolist() == [[2.0] * 8] * 2
    assert list(file.tensors) == ["t0", "t1", "t2"]
    assert list(open_gguf(small).tensors) == ["t2", "t1", "t0"]


def test_types_are_kept_where_known(tmp_path):
    path = tmp_path / "m.gguf"
    types = {"a": "u16", "b": "i64", "c": "f64", "d": "arr[u8]", "unused": "u8"}
    write_gguf(path, {"a": 1, "b": 1, "c": 1.0, "d": [1, 2], "e": 1}, [], metadata_types=types)
    del types["unused"]
    assert open_gguf(path).metadata_types == types | {"e": "u32"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_failure_leaves_the_old_file_and_no_other(small, error):
    before = small.read_bytes()

    def fail():
        raise error

    tensors = [TensorToWrite("a", (8,), "F32", np.zeros(32, np.uint8)), TensorToWrite("b", (8,), "F32", fail)]
    with pytest.raises(error):
        write_gguf(small, {}, tensors)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_a_stopped_run_goes_on_for_the_same_tensors_only(tmp_path):
    """Of the whole and of shards; another name, type or value in the header begins anew."""
    path, made, told = tmp_path / "m.gguf", [], []

    def tensors(stop=None, name="t2"):
        def make(n):
            if n == stop:
                raise KeyboardInterrupt
            made.append(n)
            return np.full(36, n, np.uint8)

        names = ["t0", "t1", name, "t3"]
        return [TensorToWrite(t, (9,), "F32", lambda n=n: make(n)) for n, t in enumerate(names)]

    def stopped(metadata, limit):
        with pytest.raises(KeyboardInterrupt):
            write_gguf(path, metadata, tensors(stop=3), split_max_bytes=limit, resume=Resume("a"))
        made.clear()

    for limit in (None, 128):
        expected = [p.read_bytes() for p in write_gguf(path, {"n": 1}, tensors(), split_max_bytes=limit)]
        resume = Resume("a", told=lambda *counts: told.append(counts))
        for metadata, name, anew in (({"n": 1}, "t2", False), ({"n": 2}, "t2", True), ({"n": 1}, "u2", True)):
            stopped({"n": 1}, limit)
            files = write_gguf(path, metadata, tensors(name=name), split_max_bytes=limit, resume=resume)
            assert made == ([0, 1, 2, 3] if anew else [3])
            assert ([file.read_bytes() for file in files] == expected) != anew
        assert told == [(3, 4)]
        told.clear()
    assert len(list(tmp_path.iterdir())) == 3


BYTES = np.zeros(32, np.uint8)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ([("t", (8,), "Q9_9", BYTES)], UnsupportedError, "tensor 't': unknown tensor type 'Q9_9'"),
        ([("t", (8,), "F32", BYTES)] * 2, FormatError, "two tensors to write have the name 't'"),
        ([("t", (1,) * 5, "F32", BYTES)], FormatError, "tensor 't' has shape .* expected up to 4 dimensions"),
        ([("t", (0, 8), "F32", BYTES)], FormatError, "none of them empty"),
        (
            [("t", (8,), "Q4_0", BYTES)],
            FormatError,
            "rows of 8 weights, expected a multiple of 32, .* of Q4_0",
        ),
        (
            [("t", (9,), "F32", BYTES)],
            FormatError,
            "are uint8 of 32 bytes, expected uint8 of 36 bytes for F32",
        ),
        (
            [("t", (8,), "F32", np.zeros(8, np.float32))],
            FormatError,
            "are float32 of 32 bytes, expected uint8",
        ),
        ([("\ud800", (8,), "F32", BYTES)], FormatError, "cannot be written as UTF-8"),
    ],
)
def test_tensors_that_no_reader_would_take(tmp_path, tensors, kind, message):
    with pytest.raises(kind, match=message):
        write_gguf(tmp_path / "m.gguf", {}, [TensorToWrite(*t) for t in tensors])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alignment", [0, 3, -32, 2**21, "32", 32.0])
def test_alignment_that_no_reader_would_take(tmp_path, alignment):
    with pytest.raises(FormatError, match=r"general\.alignment is .*, expected a power of two"):
        write_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, [])


def test_missing_folder(tmp_path):
    with pytest.raises(QjaxError, match="there is no folder"):
        write_gguf(tmp_path / "none" / "m.gguf", {}, [])
