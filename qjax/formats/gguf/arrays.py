"""ggml blocks <-> packed arrays, as a table: which bytes of a block are which leaf.

Every type's block is a C struct; loading takes it apart into one array a field (the codes of a whole row side by
side, the scales of a whole row side by side), writing puts it together again. No bit is changed but Q5's plane of
upper bits, whose 32 bits are put in another order (and back).
Sources: ggml-common.h's structs; `gguf.quants` is the oracle of the tests.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from qjax.arrays import AffineArray, CodebookArray, LaneBlockedArray, QuantizedArray, RawBlockArray, TwoLevelArray
from qjax.arrays.codebook import E2M1_VALUES, IQ4_VALUES
from qjax.arrays.planes import Plane, pack_plane, unpack_plane
from qjax.errors import UnsupportedError
from qjax.formats.gguf.types import GGML_TYPES

Bytes = UInt8[np.ndarray, "... nbytes"]

# A row's upper bits of Q5_0 and Q5_1: bit j of a little-endian uint32 is code j, in the file; strided in memory.
FILE_BITS, MEMORY_BITS = Plane(1, 1), Plane(1, 4)


class Field(NamedTuple):
    """`nbytes` of each block become the leaf `leaf` ("planes[0]" is the first plane)."""

    leaf: str
    nbytes: int
    dtype: Any = np.uint8


class BlockType(NamedTuple):
    """A ggml type that has a family: its fields in file order, the class, and its static fields."""

    fields: tuple[Field, ...]
    family: type[QuantizedArray]
    static: dict[str, Any]


F16 = np.float16
_AFFINE_5 = (Plane(4, 16), MEMORY_BITS)

BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(
        (Field("scale", 2, F16), Field("planes[0]", 16)),
        AffineArray,
        {"layout": (Plane(4, 16),), "offset": 8},
    ),
    "Q4_1": BlockType(
        (Field("scale", 2, F16), Field("minimum", 2, F16), Field("planes[0]", 16)),
        AffineArray,
        {"layout": (Plane(4, 16),), "offset": 0},
    ),
    "Q5_0": BlockType(
        (Field("scale", 2, F16), Field("planes[1]", 4), Field("planes[0]", 16)),
        AffineArray,
        {"layout": _AFFINE_5, "offset": 16},
    ),
    "Q5_1": BlockType(
        (Field("scale", 2, F16), Field("minimum", 2, F16), Field("planes[1]", 4), Field("planes[0]", 16)),
        AffineArray,
        {"layout": _AFFINE_5, "offset": 0},
    ),
    "Q8_0": BlockType(
        (Field("scale", 2, F16), Field("planes[0]", 32)),
        AffineArray,
        {"layout": (Plane(8, 1),), "offset": 128},
    ),
    "Q2_K": BlockType(
        (
            Field("sub_scales", 16),
            Field("planes[0]", 64),
            Field("super_scale", 2, F16),
            Field("super_minimum", 2, F16),
        ),
        TwoLevelArray,
        {"layout": (Plane(2, 32),), "packing": "q2_k", "offset": 0},
    ),
    "Q3_K": BlockType(
        (
            Field("planes[1]", 32),
            Field("planes[0]", 64),
            Field("sub_scales", 12),
            Field("super_scale", 2, F16),
        ),
        TwoLevelArray,
        {"layout": (Plane(2, 32), Plane(1, 32)), "packing": "q3_k", "offset": 4},
    ),
    "Q4_K": BlockType(
        (
            Field("super_scale", 2, F16),
            Field("super_minimum", 2, F16),
            Field("sub_scales", 12),
            Field("planes[0]", 128),
        ),
        TwoLevelArray,
        {"layout": (Plane(4, 32),), "packing": "q4_k", "offset": 0},
    ),
    "Q5_K": BlockType(
        (
            Field("super_scale", 2, F16),
            Field("super_minimum", 2, F16),
            Field("sub_scales", 12),
            Field("planes[1]", 32),
            Field("planes[0]", 128),
        ),
        TwoLevelArray,
        {"layout": (Plane(4, 32), Plane(1, 32)), "packing": "q4_k", "offset": 0},
    ),
    "Q6_K": BlockType(
        (
            Field("planes[0]", 128),
            Field("planes[1]", 64),
            Field("sub_scales", 16),
            Field("super_scale", 2, F16),
        ),
        TwoLevelArray,
        {"layout": (Plane(4, 64), Plane(2, 32)), "packing": "q6_k", "offset": 32},
    ),
    "IQ4_NL": BlockType(
        (Field("scale", 2, F16), Field("planes[0]", 16)),
        CodebookArray,
        {"layout": (Plane(4, 16),), "table": IQ4_VALUES, "scale_kind": "float"},
    ),
    "IQ4_XS": BlockType(
        (Field("scale", 2, F16), Field("sub_scales", 6), Field("planes[0]", 128)),
        CodebookArray,
        {"layout": (Plane(4, 16),), "table": IQ4_VALUES, "scale_kind": "two_level"},
    ),
    "MXFP4": BlockType(
        (Field("scale", 1), Field("planes[0]", 16)),
        CodebookArray,
        {"layout": (Plane(4, 16),), "table": E2M1_VALUES, "scale_kind": "e8m0"},
    ),
}

RAW_TYPES = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "NVFP4"])
FLOAT_TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
}
READABLE_TYPES = frozenset(BLOCK_TYPES) | RAW_TYPES | frozenset(FLOAT_TYPES)

_LEAVES: dict[type, tuple[str, ...]] = {
    AffineArray: ("scale", "minimum", "zero"),
    TwoLevelArray: ("sub_scales", "super_scale", "super_minimum"),
    CodebookArray: ("scale", "sub_scales"),
}


def _reorder(leaf: str, data: Any, kind: BlockType, to_memory: bool) -> Any:
    """Q5_0 and Q5_1's plane of upper bits between the file's order and memory's; all else as it is."""
    if leaf != "planes[1]" or kind.static["layout"][1] != MEMORY_BITS:
        return data
    source, target = (FILE_BITS, MEMORY_BITS) if to_memory else (MEMORY_BITS, FILE_BITS)
    return pack_plane(unpack_plane(data, source), target)


def from_blocks(type_name: str, raw: Bytes, put: Callable[[np.ndarray], Any] = jnp.asarray) -> QuantizedArray | Any:
    """Packed array of a tensor's bytes; a plain array for float types (F64 is rounded to float32).

    Args:
      type_name: ggml's name, e.g. "Q4_K".
      raw: uint8 [..., rows, bytes of a row], or [bytes of a row] for a vector; may be a memory map.
      put: what takes each numpy leaf to its device.

    Raises:
      UnsupportedError: a type without a decoder.
    """
    if type_name in FLOAT_TYPES:
        values = np.ascontiguousarray(raw).view(FLOAT_TYPES[type_name])
        return put(values.astype(np.float32) if type_name == "F64" else values)
    if type_name in RAW_TYPES:
        return RawBlockArray(put(np.ascontiguousarray(raw)), None, type=type_name)
    if type_name not in BLOCK_TYPES:
        raise UnsupportedError(f"tensor type {type_name} is not known; known are {', '.join(sorted(READABLE_TYPES))}")
    kind = BLOCK_TYPES[type_name]
    *lead, row_bytes = raw.shape
    block_bytes = GGML_TYPES[type_name].block_bytes
    blocks = raw.reshape(*lead, row_bytes // block_bytes, block_bytes)
    leaves: dict[str, Any] = {}
    start = 0
    for field in kind.fields:
        part = np.ascontiguousarray(blocks[..., start : start + field.nbytes]).reshape(*lead, -1)
        leaves[field.leaf] = put(_reorder(field.leaf, part, kind, to_memory=True).view(field.dtype))
        start += field.nbytes
    planes = tuple(leaves[f"planes[{i}]"] for i in range(len(kind.static["layout"])))
    rest = {name: leaves.get(name) for name in _LEAVES[kind.family]}
    return kind.family(planes=planes, **rest, **kind.static)  # pyright: ignore[reportCallIssue]


def _leaf(array: Any, leaf: str) -> Any:
    """A leaf by its name in BLOCK_TYPES."""
    return array.planes[int(leaf[-2])] if leaf.startswith("planes") else getattr(array, leaf)


def type_of(array: Any) -> str:
    """ggml's name of the type that stores this array as it is.

    Raises:
      UnsupportedError: no ggml type has these bits, groups and scales.
    """
    if isinstance(array, LaneBlockedArray):
        # Its type is that of the plain array, whose shapes are enough.
        array = jax.eval_shape(LaneBlockedArray.plain, array)
    if isinstance(array, RawBlockArray):
        return array.type
    if not isinstance(array, QuantizedArray):
        for name, dtype in FLOAT_TYPES.items():
            if array.dtype == dtype:
                return name
        raise UnsupportedError(f"GGUF cannot hold an array of {array.dtype}; convert it to float32 or float16")
    for name, kind in BLOCK_TYPES.items():
        if type(array) is not kind.family:
            continue
        if any(getattr(array, key) != value for key, value in kind.static.items()):
            continue
        held = {leaf for leaf in _LEAVES[kind.family] if getattr(array, leaf) is not None}
        if held != {field.leaf for field in kind.fields if not field.leaf.startswith("planes")}:
            continue
        if any(_leaf(array, field.leaf).dtype != field.dtype for field in kind.fields):
            continue
        size = GGML_TYPES[name].block_size
        group = array.group_size if size == 32 else size  # pyright: ignore[reportAttributeAccessIssue]
        if group == size:
            return name
    raise UnsupportedError(f"no GGUF type holds {array!r} without loss; re-quantize it to one that does")


def to_blocks(array: Any) -> Bytes:
    """The bytes [..., rows, bytes of a row] of `array` in the file type that `type_of` names."""
    name = type_of(array)
    if isinstance(array, LaneBlockedArray):
        array = jax.tree.map(np.asarray, array).plain()
    if name in FLOAT_TYPES:
        return np.ascontiguousarray(np.asarray(array)).view(np.uint8)
    if isinstance(array, RawBlockArray):
        return np.asarray(array.blocks)
    kind = BLOCK_TYPES[name]
    parts = []
    for field in kind.fields:
        data = np.ascontiguousarray(np.asarray(_leaf(array, field.leaf))).view(np.uint8)
        data = _reorder(field.leaf, data, kind, to_memory=False)
        parts.append(data.reshape(*data.shape[:-1], -1, field.nbytes))
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)
