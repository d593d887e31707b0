"""Damaged copies of real files: each opens, or raises QjaxError, soon and in little memory."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.formats.gguf.container import open_gguf

NUMBERS = [0, 1, 2**31, 2**32 - 1, 2**32, 10**9, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of gguf-py with strings, arrays and packed tensors, and where its data starts."""
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_float32("a.float", 0.5)
    writer.add_array("a.strings", ["one", "", "three" * 4])
    writer.add_array("a.numbers", list(range(9)))
    rng = np.random.default_rng(1)
    for index in range(4):
        data = gguf.quantize(rng.normal(size=(2, 3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"w{index}", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("v", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes(), gguf.GGUFReader(path).data_offset


def mutate(draw, data: bytes, header: int) -> bytes:
    """One to four changes, nearly all of them in the header."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        limit = min(header, len(damaged) - 1)
        if limit < 1:
            break
        place = draw(st.integers(0, limit))
        kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "delete", "copy"]))
        if kind == "flip":
            damaged[place] ^= draw(st.integers(1, 255))
        elif kind == "number":
            number = draw(st.sampled_from(NUMBERS) | st.integers(0, 2**64 - 1))
            damaged[place : place + 8] = struct.pack("<Q", number)
        elif kind == "cut":
            del damaged[draw(st.integers(place, len(damaged))) :]
        elif kind == "insert":
            damaged[place:place] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "delete":
            del damaged[place : place + draw(st.integers(1, 40))]
        else:
            source = draw(st.integers(0, limit))
            damaged[place : place + 40] = damaged[source : source + 40]
    return bytes(damaged)


def use(path) -> None:
    """Open and look at everything."""
    file = open_gguf(path)
    for key in file.metadata:
        assert file.metadata[key] is not None
    for name, info in file.tensors.items():
        assert file.raw(name).nbytes == info.nbytes


def survives(path, data: bytes) -> None:
    """Success or one line of QjaxError, in less than 5 s and 30 times the file's size."""
    path.write_bytes(data)
    start = time.perf_counter()
    tracemalloc.start()
    message = f"{path}: fine"
    try:
        use(path)
    except QjaxError as error:
        message = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert peak < 30 * len(data) + 500_000
    assert time.perf_counter() - start < 5


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_small_file(small, tmp_path, data):
    survives(tmp_path / "m.gguf", mutate(data.draw, *small))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_of_llama_cpp(interop, tmp_path, data):
    path = data.draw(st.sampled_from(["tiny-imat-iq1_s.gguf", "tiny-imat-q2_K.gguf", "imatrix.gguf"]))
    # The header of the tiny models ends within 48 KiB.
    survives(tmp_path / "m.gguf", mutate(data.draw, (interop / path).read_bytes(), 48 * 1024))


@pytest.mark.parametrize("number", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2**40)), 2**64 - 1])
def test_every_place_of_the_header_with_a_large_number(small, tmp_path, number):
    """A hostile length at each byte in turn: the fields of the file are all among them."""
    data, header = small
    path = tmp_path / "m.gguf"
    for place in range(4, header - 8):
        survives(path, data[:place] + struct.pack("<Q", number) + data[place + 8 :])


def test_memory_of_a_header_full_of_little_things(tmp_path):
    """The worst a file can do: as many keys, tokens and tensors as its bytes can hold."""
    count = 3000

    def name(index):
        return struct.pack("<Q", 3) + index.to_bytes(3, "big").translate(bytes(b % 128 for b in range(256)))

    keys = b"".join(name(i) + struct.pack("<IB", 0, 1) for i in range(128 * 20))
    tokens = struct.pack("<Q", 1) + b"t" + struct.pack("<IIQ", 9, 8, count) + b"".join(name(i) for i in range(count))
    tensors = b"".join(name(i) + struct.pack("<IQIQ", 1, 1, 24, 32 * i) for i in range(128 * 20))
    head = b"GGUF" + struct.pack("<IQQ", 3, 128 * 20, 128 * 20 + 1) + keys + tokens + tensors
    survives(tmp_path / "m.gguf", head + bytes(32 * 128 * 20 + 32))
