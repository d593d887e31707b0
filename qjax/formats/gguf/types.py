"""The tensor types of GGUF files: their ids, how many weights a block holds and in how many bytes.

Sources: `enum ggml_type` of ggml/include/ggml.h and the block structs of ggml/src/ggml-common.h in llama.cpp
(`gguf.GGML_QUANT_SIZES` of gguf-py says the same).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qjax.errors import QjaxError, UnsupportedError


@dataclass(frozen=True)
class GgmlType:
    """One tensor type: every `block_size` weights of a row lie in `block_bytes` bytes on disk."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    def row_bytes(self, length: int) -> int:
        """Bytes of a row of `length` weights, which must be a multiple of `block_size`."""
        return length // self.block_size * self.block_bytes


_TABLE = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    # 36 bytes in ggml-common.h today, 40 in gguf-py (an older struct); no file holds it, only activations.
    GgmlType("Q8_1", 9, 32, 40),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("Q8_K", 15, 256, 292),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
    # llama.cpp's Q2_0. A fork writes blocks of 128 weights in 34 bytes under the same id: such a file
    # fails the checks of tensor offsets, since its tensors are shorter than these sizes say.
    GgmlType("Q2_0", 42, 64, 18),
)

GGML_TYPES: Mapping[str, GgmlType] = MappingProxyType({t.name: t for t in _TABLE})
GGML_TYPES_BY_ID: Mapping[int, GgmlType] = MappingProxyType({t.id: t for t in _TABLE})

# Ids that old files may hold; GGML has dropped the types and reuses none of the numbers.
REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)


def type_of_id(type_id: int, where: str) -> GgmlType:
    """The type with this id; `where` (file and tensor) opens the error message.

    Raises:
        UnsupportedError: the id is unknown, or of a type that GGML has removed.
    """
    found = GGML_TYPES_BY_ID.get(type_id)
    if found is not None:
        return found
    if type_id in REMOVED_TYPES:
        raise UnsupportedError(
            f"{where} has type {REMOVED_TYPES[type_id]} (id {type_id}), which GGML has removed: "
            "make the file again with a current llama.cpp"
        )
    raise UnsupportedError(
        f"{where} has the unknown tensor type {type_id}, expected an id from 0 to {_TABLE[-1].id}: "
        "the file is damaged, or newer than this qjax"
    )


def type_of_name(name: str, where: str) -> GgmlType:
    """The type with this name, such as "Q4_K"; `where` opens the error message.

    Raises:
        UnsupportedError: no such type.
    """
    found = GGML_TYPES.get(name)
    if found is None:
        raise UnsupportedError(f"{where}: unknown tensor type {name!r}, expected one of {', '.join(GGML_TYPES)}")
    return found


def type_named(name: str) -> str:
    """ggml's name of a type, from any case.

    Raises:
        QjaxError: there is no such type.
    """
    if name.upper() not in GGML_TYPES:
        raise QjaxError(f"expected a ggml type such as Q4_K or F16, got {name!r}")
    return name.upper()
