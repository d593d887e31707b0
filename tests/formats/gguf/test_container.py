"""Opening files: gguf-py's reader is the oracle for metadata and tensors."""

import mmap
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from qjax.errors import FormatError
from qjax.formats.gguf.container import open_gguf


@pytest.fixture
def model(tmp_path) -> Path:
    """A small file written by gguf-py, with a value of each kind."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("text", "日本語\n")
    writer.add_string("empty", "")
    for letter, value in (
        ("uint8", 255),
        ("int8", -128),
        ("uint16", 65535),
        ("int16", -2),
        ("uint32", 2**32 - 1),
    ):
        getattr(writer, f"add_{letter}")(letter, value)
    writer.add_int32("int32", -(2**31))
    writer.add_uint64("uint64", 2**64 - 1)
    writer.add_float32("float32", 1e-5)
    writer.add_float64("float64", 1e-5)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_array("strings", ["a", "", "ю", "<s>"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("bools", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("f32", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("f16", rng.normal(size=(2, 3, 4)).astype(np.float16))
    writer.add_tensor("vector", rng.normal(size=7).astype(np.float32))
    packed = gguf.quantize(rng.normal(size=(6, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q4", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equals_oracle(path: Path):
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    names = {"UINT": "u", "INT": "i", "FLOAT": "f", "BOOL": "bool", "STRING": "str"}
    for key, field in fields.items():
        value, expected = ours.metadata[key], field.contents()
        if isinstance(value, np.ndarray):
            assert value.tolist() == expected, key
        else:
            assert value == expected, key
            assert type(value) is type(expected), key
        kind = field.types[-1].name
        letter = names[kind.rstrip("0123456789")] + kind.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        assert ours.metadata_types[key] == (f"arr[{letter}]" if is_array else letter)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
        assert info.type == tensor.tensor_type.name
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        raw = ours.raw(tensor.name)
        assert raw.shape == (*info.shape[:-1], info.row_bytes)
        assert raw.tobytes() == tensor.data.tobytes()


def test_file_of_gguf_py(model):
    assert_equals_oracle(model)


def test_values_have_plain_python_types(model):
    metadata = open_gguf(model).metadata
    assert metadata["strings"] == ["a", "", "ю", "<s>"]
    assert metadata["strings"] is metadata["strings"]
    assert metadata["ints"].dtype == np.int32
    assert not metadata["ints"].flags.writeable
    assert metadata["bools"].dtype == np.bool_
    assert metadata["yes"] is True
    assert metadata["uint64"] == 2**64 - 1
    assert "nothing" not in metadata
    with pytest.raises(KeyError):
        metadata["nothing"]


def test_files_of_llama_cpp(interop):
    files = sorted(interop.glob("*.gguf"))
    assert files
    for path in files:
        assert_equals_oracle(path)


def test_vocabulary_of_llama_cpp(vocab_folder):
    assert_equals_oracle(vocab_folder / "ggml-vocab-llama-spm.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-coder", "falcon", "gpt-2", "llama-bpe", "qwen2"])
def test_large_vocabulary_of_llama_cpp(vocab_folder, name):
    # gguf-py's reader takes up to half a minute for one of these.
    assert_equals_oracle(vocab_folder / f"ggml-vocab-{name}.gguf")


def test_a_large_vocabulary_opens_at_once(vocab_folder):
    """128k tokens and 280k merges, decoded too."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        metadata = open_gguf(vocab_folder / "ggml-vocab-llama-bpe.gguf").metadata
        assert len(metadata["tokenizer.ggml.tokens"]) == 128256
        assert len(metadata["tokenizer.ggml.merges"]) == 280147
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_vocabulary_without_tensors(vocab_folder):
    assert open_gguf(vocab_folder / "ggml-vocab-gpt-2.gguf").tensors == {}


def test_bytes_that_are_no_utf8(tmp_path):
    """Tokens keep their bytes; text for people gets replacement characters, which can be printed."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("text", "caf@")
    writer.add_array("tokens", ["@", "ok", "x@y"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path.write_bytes(path.read_bytes().replace(b"@", b"\xff"))
    metadata = open_gguf(path).metadata
    assert metadata["text"] == "caf\ufffd"
    assert [t.encode("utf-8", "surrogateescape") for t in metadata["tokens"]] == [b"\xff", b"ok", b"x\xffy"]


def test_raw_is_a_view_that_outlives_the_file(model):
    file = open_gguf(model)
    view = file.raw("f32")
    assert not view.flags.owndata
    assert not view.flags.writeable
    expected = gguf.GGUFReader(model).tensors[0].data.tobytes()
    model.unlink()
    del file
    assert view.tobytes() == expected


def test_release_drops_pages_and_keeps_the_view(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.arange(2**22, dtype=np.float32))
    writer.add_tensor("v", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    view = file.raw("w")
    total = int(view.sum(dtype=np.int64))
    before = resident_file_bytes()
    file.release("w")
    if before is not None and hasattr(mmap, "MADV_DONTNEED"):
        assert before - resident_file_bytes() > 2**23
    assert int(view.sum(dtype=np.int64)) == total
    file.release("v")


def resident_file_bytes():
    """Bytes of mapped files in this process's memory; None where the system does not say."""
    if not os.path.exists("/proc/self/status"):  # noqa: PTH110
        return None
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


def test_unknown_tensor(model):
    file = open_gguf(model)
    for call in (file.raw, file.release, file.info):
        with pytest.raises(FormatError, match=r"model\.gguf: there is no tensor 'x' among the 4 of the file"):
            call("x")


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match=r"m\.gguf: there is no such file"):
        open_gguf(str(tmp_path / "m.gguf"))


def test_directory(tmp_path):
    with pytest.raises(FormatError, match=r"this is a directory, expected a \.gguf file"):
        open_gguf(tmp_path)


def test_empty_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.touch()
    with pytest.raises(FormatError, match=r"m\.gguf: the file is empty"):
        open_gguf(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FormatError, match="no regular file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_names_the_system_refuses(tmp_path):
    for name in ("a" * 300 + ".gguf", "a\0b.gguf"):
        with pytest.raises(FormatError, match="cannot be read"):
            open_gguf(tmp_path / name)


def test_repr(model):
    assert "4 tensors, 1 file(s)" in repr(open_gguf(model))
    assert repr(open_gguf(model).metadata) == "Metadata(17 keys)"
