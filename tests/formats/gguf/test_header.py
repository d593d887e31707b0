"""Headers made byte by byte: what is sound is read, what is hostile gives one clear line, cheaply."""

import struct
import tracemalloc

import pytest

from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats.gguf.container import open_gguf

U32, STRING, ARRAY, F32, Q4_K = 4, 8, 9, 0, 12
HUGE = 2**64 - 1


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def entry(key, type_id, body):
    return string(key) + u32(type_id) + body


def tensor(name="t", dims=(4,), type_id=F32, offset=0):
    """`dims` in the file's order, the fastest first."""
    return string(name) + u32(len(dims)) + b"".join(u64(d) for d in dims) + u32(type_id) + u64(offset)


def build(entries=(), tensors=(), data=b"", *, n_keys=None, n_tensors=None, version=3, magic=b"GGUF"):
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(entries) if n_keys is None else n_keys)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


ARCH = entry("general.architecture", STRING, string("llama"))
ONE = {"entries": [ARCH], "tensors": [tensor()], "data": bytes(16)}
# A file of another format that is long enough for its first field.
SAFETENSORS = u64(40) + b'{"a":{"dtype":"F32","shape":[1]}}'.ljust(40) + bytes(4)

FORMAT_ERRORS = {
    "wrong magic": (b"ABCD" + bytes(100), r"expected a GGUF file \(magic b'GGUF'\), found b'ABCD'"),
    "three bytes": (b"GGU", "expected a GGUF file"),
    "magic only": (b"GGUF", "the version needs 4 bytes at offset 4, found 0"),
    "no counts": (b"GGUF" + u32(3) + bytes(7), "the number of tensors needs 8 bytes"),
    "zip": (b"PK\x03\x04" + bytes(100), "found a zip archive"),
    "pickle": (b"\x80\x02}q" + bytes(100), "found a pickle"),
    "html": (b"\n <!DOCTYPE html><html>" + bytes(100), "found an HTML or XML page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "found a Git LFS pointer"),
    "safetensors": (SAFETENSORS, "found a safetensors file"),
    "n_kv": (build(**ONE, n_keys=HUGE), f"claims {HUGE} metadata keys, but only"),
    "n_kv, a little too many": (build(**ONE, n_keys=12), "claims 12 metadata keys"),
    "n_tensors": (build(**ONE, n_tensors=HUGE), f"claims {HUGE} tensors, but only"),
    "n_tensors, one too many": (build(**ONE, n_tensors=2), "tensors 't' .* and '' .* overlap"),
    "key length": (build([u64(HUGE) + b"key" + bytes(20)]), f"metadata key 0 needs {HUGE} bytes"),
    "key not UTF-8": (build([entry(b"\xff\xfe", U32, u32(1))]), "metadata key 0 is not UTF-8"),
    "double key": (build([ARCH, ARCH]), "metadata 'general.architecture' stands twice"),
    "value type": (build([entry("k", 13, bytes(20))]), "metadata 'k' has the unknown value type 13"),
    "value string length": (build([entry("k", STRING, u64(HUGE))]), f"metadata 'k' needs {HUGE} bytes"),
    "value cut": (build()[:16] + u64(1) + string("kkkkk") + u32(11), "metadata 'kkkkk' needs 8 bytes"),
    "item type": (build([entry("k", ARRAY, u32(77) + u64(1) + bytes(8))]), "the unknown value type 77"),
    "array count": (
        build([entry("k", ARRAY, u32(U32) + u64(2**62))]),
        f"an array of {2**62} u32, needs {2**64} bytes",
    ),
    "array of bytes": (build([entry("k", ARRAY, u32(0) + u64(2**40))]), f"needs {2**40} bytes at offset"),
    "strings count": (
        build([entry("k", ARRAY, u32(STRING) + u64(HUGE))]),
        f"metadata 'k' of {HUGE} strings needs",
    ),
    "string in array": (
        build([entry("k", ARRAY, u32(STRING) + u64(3) + string("a") + u64(HUGE) + bytes(64))]),
        "metadata 'k' of 3 strings reaches past the end",
    ),
    "last string in array": (
        build([entry("k", ARRAY, u32(STRING) + u64(2) + string("a") + u64(999) + bytes(64))]),
        "metadata 'k' of 2 strings reaches past the end",
    ),
    "alignment 0": (
        build([entry("general.alignment", U32, u32(0))]),
        r"general.alignment is '0' \(u32\), expected a power",
    ),
    "alignment 48": (build([entry("general.alignment", U32, u32(48))]), "general.alignment is '48'"),
    "alignment 2 GiB": (
        build([entry("general.alignment", U32, u32(2**31))]),
        f"general.alignment is '{2**31}'",
    ),
    "alignment u64": (build([entry("general.alignment", 10, u64(32))]), r"general.alignment is '32' \(u64\)"),
    "alignment string": (
        build([entry("general.alignment", STRING, string("32"))]),
        r"general.alignment is '32' \(str\)",
    ),
    "alignment of two lines": (build([entry("general.alignment", STRING, string("3\n2"))]), r"is '3\\n2' \(str\)"),
    "tensor name length": (build([], [u64(HUGE) + bytes(24)]), f"the name of tensor 0 needs {HUGE} bytes"),
    "tensor name": (build([], [tensor(b"\xff")], bytes(16)), "the name of tensor 0 is not UTF-8"),
    "n_dims 5": (
        build([], [tensor(dims=(1,) * 5)], bytes(16)),
        "tensor 't' has 5 dimensions, expected at most 4",
    ),
    "n_dims huge": (build([], [string("t") + u32(2**32 - 1) + bytes(20)]), f"has {2**32 - 1} dimensions"),
    "empty dimension": (
        build([], [tensor(dims=(4, 0))], bytes(16)),
        r"has an empty dimension, shape \(0, 4\)",
    ),
    "overflow": (build([], [tensor(dims=(2**32, 2**31))], bytes(16)), "overflows 64 bits"),
    # Multiplied in 64 bits these dimensions come out as 4 elements.
    "overflow to little": (build([], [tensor(dims=(2**62 + 1, 4))], bytes(16)), "overflows 64 bits"),
    "row length": (
        build([], [tensor(dims=(255, 2), type_id=Q4_K)], bytes(288)),
        "tensor 't' has rows of 255 weights, expected a multiple of 256, the block size of Q4_K",
    ),
    "unaligned": (
        build([], [tensor(offset=16)], bytes(64)),
        "lies at offset 16, expected a multiple of the alignment 32",
    ),
    "offset": (
        build([], [tensor(offset=2**63)], bytes(16)),
        r"the data of tensor 't' \(16 bytes at \d+\) reaches \d+ bytes",
    ),
    "past the end": (
        build([], [tensor(dims=(100,))], bytes(390)),
        "tensor 't' .* reaches 10 bytes past the end",
    ),
    "no data": (build([], [tensor()])[:-1], "reaches 1[67] bytes past the end of the file: truncated"),
    "overlap": (
        build([], [tensor("a", (16,)), tensor("b", (8,), offset=32)], bytes(64)),
        r"tensors 'a' \(F32, 64 bytes at \d+\) and 'b' \(at \d+\) overlap",
    ),
    "same place": (build([], [tensor("a"), tensor("b")], bytes(64)), "tensors 'a' .* and 'b' .* overlap"),
    "double tensor": (build([], [tensor("a"), tensor("a", offset=32)], bytes(64)), "tensor 'a' stands twice"),
}

UNSUPPORTED_ERRORS = {
    "version 1": (build(version=1), "GGUF version 1, expected 2 or 3"),
    "version 4": (build(version=4), "GGUF version 4, expected 2 or 3"),
    "version 0": (build(version=0), "GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
    "reversed magic": (b"FUGG" + bytes(40), "reversed byte order"),
    "GGML": (b"lmgg" + bytes(40), "this is a GGML file, older than GGUF"),
    "GGJT": (b"tjgg" + bytes(40), "this is a GGJT file, older than GGUF"),
    "array of arrays": (
        build([entry("k", ARRAY, u32(ARRAY) + u64(1) + bytes(12))]),
        "'k' is an array of arrays",
    ),
    "removed type": (
        build([], [tensor(type_id=4)], bytes(16)),
        r"tensor 't' has type Q4_2 \(id 4\), which GGML has removed",
    ),
    "unknown type": (build([], [tensor(type_id=99)], bytes(16)), "tensor 't' has the unknown tensor type 99"),
}


def fails(path, data, kind, message):
    """Opening `data` raises `kind` with one line naming the file, and allocates next to nothing."""
    path.write_bytes(data)
    with pytest.raises(kind, match=message) as caught:
        open_gguf(path)
    tracemalloc.start()
    with pytest.raises(kind):
        open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < 400 + len(str(path))
    assert peak < 500_000


@pytest.mark.parametrize("case", FORMAT_ERRORS)
def test_damaged_or_hostile(tmp_path, case):
    fails(tmp_path / "m.gguf", FORMAT_ERRORS[case][0], FormatError, FORMAT_ERRORS[case][1])


@pytest.mark.parametrize("case", UNSUPPORTED_ERRORS)
def test_unsupported(tmp_path, case):
    fails(tmp_path / "m.gguf", UNSUPPORTED_ERRORS[case][0], UnsupportedError, UNSUPPORTED_ERRORS[case][1])


def test_long_and_strange_names_stay_on_one_line(tmp_path):
    name = "a\nb\x1b[31m" * 1000
    fails(
        tmp_path / "m.gguf",
        build([], [tensor(name, dims=(1,) * 5)], bytes(16)),
        FormatError,
        r"tensor 'a\\nb\\x1b",
    )


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three(tmp_path, version):
    path = tmp_path / "m.gguf"
    data = struct.pack("<8f", *range(8))
    path.write_bytes(build([ARCH], [tensor("w", (4, 2))], data, version=version))
    file = open_gguf(path)
    assert file.version == version
    assert file.metadata["general.architecture"] == "llama"
    assert file.tensors["w"].shape == (2, 4)
    assert file.raw("w").tobytes() == data


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_alignment_moves_the_data(tmp_path, alignment):
    path = tmp_path / "m.gguf"
    head = build([entry("general.alignment", U32, u32(alignment))], [tensor()])
    # `build` pads to 32; the entry and the tensor end after 24 + 33 + 33 bytes.
    head = head[:90] + bytes(-90 % alignment)
    path.write_bytes(head + b"0123456789abcdef")
    assert open_gguf(path).raw("t").tobytes() == b"0123456789abcdef"


def test_tensor_without_dimensions_is_one_weight(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(build([], [tensor(dims=())], b"abcd"))
    file = open_gguf(path)
    assert file.tensors["t"].shape == ()
    assert file.raw("t").shape == (4,)


def test_gaps_and_any_order_of_tensors_are_fine(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(build([], [tensor("b", offset=96), tensor("a", offset=0)], bytes(96) + b"b" * 16))
    file = open_gguf(path)
    assert list(file.tensors) == ["b", "a"]
    assert file.raw("b").tobytes() == b"b" * 16


def test_every_truncation_of_a_small_file_is_an_error(tmp_path):
    """Cut anywhere before the end of the last tensor's data."""
    path = tmp_path / "m.gguf"
    tokens = entry("tokens", ARRAY, u32(STRING) + u64(3) + string("a") + string("") + string("ccc"))
    numbers = entry("numbers", ARRAY, u32(U32) + u64(2) + u32(1) + u32(2))
    whole = build([ARCH, tokens, numbers], [tensor("a"), tensor("b", (4, 2), offset=32)], bytes(64))
    path.write_bytes(whole)
    assert len(open_gguf(path).tensors) == 2
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(QjaxError, match=r"m\.gguf: "):
            open_gguf(path)
