import gguf
import pytest

from qjax.errors import UnsupportedError
from qjax.formats.gguf.types import GGML_TYPES, GGML_TYPES_BY_ID, REMOVED_TYPES, type_of_id, type_of_name


def test_ids_and_block_sizes_are_those_of_gguf_py():
    ours = {t.name: (t.id, (t.block_size, t.block_bytes)) for t in GGML_TYPES.values()}
    theirs = {t.name: (t.value, size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    # gguf-py 0.19 does not know Q2_0 yet.
    theirs.setdefault("Q2_0", (42, (64, 18)))
    assert ours == theirs


def test_every_id_is_one_type_or_removed():
    assert len(GGML_TYPES) == len(GGML_TYPES_BY_ID)
    assert set(GGML_TYPES_BY_ID) | set(REMOVED_TYPES) == set(range(43))
    assert not set(GGML_TYPES_BY_ID) & set(REMOVED_TYPES)


def test_row_bytes():
    assert GGML_TYPES["Q4_K"].row_bytes(512) == 288
    assert GGML_TYPES["F32"].row_bytes(3) == 12


@pytest.mark.parametrize("type_id", sorted(REMOVED_TYPES))
def test_removed_type_is_named(type_id):
    with pytest.raises(UnsupportedError, match=rf"a\.gguf: tensor 't' has type {REMOVED_TYPES[type_id]} \(id"):
        type_of_id(type_id, "a.gguf: tensor 't'")


@pytest.mark.parametrize("type_id", [43, 100, 2**32 - 1])
def test_unknown_id(type_id):
    with pytest.raises(UnsupportedError, match=f"unknown tensor type {type_id}"):
        type_of_id(type_id, "a.gguf: tensor 't'")


def test_unknown_name():
    assert type_of_name("Q4_K", "here").id == 12
    with pytest.raises(UnsupportedError, match="here: unknown tensor type 'Q4_Z', expected one of F32, F16"):
        type_of_name("Q4_Z", "here")
