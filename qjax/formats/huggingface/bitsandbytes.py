"""bitsandbytes checkpoints: NF4 and FP4 with absmax scales, perhaps quantized themselves, and LLM.int8()'s rows.

4 bits: `weight` holds the codes of all rows one after the other, two a byte, the first in the HIGH four bits;
`weight.absmax` the scale of each `blocksize` codes in that order; `weight.quant_map` the 16 values; and
`weight.quant_state.bitsandbytes__nf4` JSON of the rest. With double quantization absmax are codes too, and a scale is
nested_quant_map[absmax] * nested_absmax[i // nested_blocksize] + nested_offset.
8 bits: w = weight * SCB / 127, a scale a row.

Source: bitsandbytes' functional.py (QuantState.as_dict, dequantize_4bit, int8_vectorwise_dequant).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qjax.arrays import AffineArray, FloatCodebookArray, affine
from qjax.arrays.planes import pack
from qjax.arrays.scheme import layout_for
from qjax.errors import UnsupportedError
from qjax.formats.huggingface.checkpoint import DTYPES
from qjax.formats.huggingface.json_files import parse_object
from qjax.formats.huggingface.parts import Found, Packed, Parts

_STATES = {"nf4": "weight.quant_state.bitsandbytes__nf4", "fp4": "weight.quant_state.bitsandbytes__fp4"}
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
# 1 / 127 as bitsandbytes has it.
_OF_127 = np.float32(7.874015718698502e-3)


class Blocks(NamedTuple):
    """How the scales of 4-bit codes lie; `nested` is None if they are floats."""

    shape: tuple[int, int]
    size: int
    nested: int | None
    offset: float


def find_4bit(parts: Parts) -> Packed:
    """The module as NF4 or FP4.

    Raises:
        FormatError: its tensors do not fit each other, or not the model's shape.
        UnsupportedError: a block size that its kind has not.
    """
    kind = next((name for name, suffix in _STATES.items() if suffix in parts), None)
    if kind is None:
        raise parts.wrong(_STATES["nf4"], f"is missing beside {', '.join(parts.stored)}")
    blocks = _blocks(parts, kind)
    out, columns = blocks.shape
    if blocks.shape != parts.shape:
        raise parts.wrong(_STATES[kind], f"says the shape {blocks.shape}, expected {parts.shape} by config.json")
    nbytes, count = out * columns // 2, -(-out * columns // blocks.size)
    stored = parts.need("weight", DTYPES)
    if stored.nbytes != nbytes or columns % 2:
        raise parts.wrong("weight", f"has {stored.nbytes} bytes, expected {nbytes} of 4-bit codes {blocks.shape}")
    parts.need("weight.quant_map", ("F32",), (16,))
    parts.need("weight.absmax", ("F32",) if blocks.nested is None else ("U8",), (count,))
    if blocks.nested is not None:
        parts.need("weight.nested_quant_map", ("F32",), (256,))
        parts.need("weight.nested_absmax", ("F32",), (-(-count // blocks.nested),))
    label = f"{kind.upper()} g{blocks.size}" + ("" if blocks.nested is None else ", double quantization")
    how = f"bitsandbytes' tensors; block sizes by {_STATES[kind].removeprefix('weight.')}"
    found = Found(parts.module, f"bitsandbytes-{kind}", 4, blocks.size, label, how)
    held = parts.choose("weight", "weight.quant_map", "weight.absmax", *(_NESTED if blocks.nested else ()))
    return Packed(found, blocks.shape, held, partial(read_4bit, blocks=blocks, parts=parts))


def _blocks(parts: Parts, kind: str) -> Blocks:
    """The quant_state, checked."""
    suffix = _STATES[kind]
    stored = parts.need(suffix, ("U8",))
    if stored.nbytes > 1 << 16:
        raise parts.wrong(suffix, f"has {stored.nbytes} bytes, expected a short JSON text")
    state = parse_object(parts.read(suffix).tobytes(), parts.where(suffix))
    shape, size = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise parts.wrong(suffix, f"says the shape {shape!r:.80}, expected two numbers")
    if type(size) is not int or not 0 < size <= 1 << 16:
        raise parts.wrong(suffix, f"says blocksize {size!r:.80}, expected a number of codes")
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset", 0.0)
    if (nested is not None) != (_NESTED[0] in parts):
        raise parts.wrong(_NESTED[0], f"{'is missing' if nested else 'is there'}, other than quant_state says")
    if nested is not None and (type(nested) is not int or not 0 < nested <= 256):
        raise UnsupportedError(f"{parts.where(suffix)} says nested_blocksize {nested!r:.80}, known are 1 to 256")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise parts.wrong(suffix, f"says nested_offset {offset!r:.80}, expected a number")
    return Blocks((shape[0], shape[1]), size, nested, float(np.float32(offset)))


def read_4bit(tensors: Mapping[str, np.ndarray], *, blocks: Blocks, parts: Parts) -> FloatCodebookArray:
    """The array, numpy leaves: scales of blocks that cross rows stand with each group of columns they serve."""
    out, columns = blocks.shape
    data = np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    codes = np.stack([data >> np.uint8(4), data & np.uint8(15)], axis=-1).reshape(out, columns)
    layout = layout_for(4, columns)
    table = parts.finite("weight.quant_map", tensors["weight.quant_map"])
    # Groups of a row that lie in one block.
    group = math.gcd(columns, blocks.size)
    groups = columns // group
    place = np.arange(out * groups, dtype=np.int64).reshape(out, groups) * group // blocks.size
    scale = tensors["weight.absmax"]
    shared: dict[str, Any] = {"layout": layout, "table": tuple(float(value) for value in table)}
    planes = pack(codes, layout)
    if blocks.nested is None:
        return FloatCodebookArray(planes, parts.finite("weight.absmax", scale)[place], **shared)
    supers = parts.finite("weight.nested_absmax", tensors["weight.nested_absmax"])
    scale_table = parts.finite("weight.nested_quant_map", tensors["weight.nested_quant_map"])
    if group != blocks.size:
        # A row's packed scales are no run of the file's: they are unpacked.
        floats = scale_table[scale] * supers[np.arange(len(scale)) // blocks.nested] + np.float32(blocks.offset)
        return FloatCodebookArray(planes, floats[place], **shared)
    first = place[:, 0]
    most = int((place[:, -1] // blocks.nested - first // blocks.nested).max()) + 1
    chosen = np.minimum(first[:, None] // blocks.nested + np.arange(most), len(supers) - 1)
    return FloatCodebookArray(
        planes,
        scale.reshape(out, groups),
        supers[chosen],
        (first % blocks.nested).astype(np.uint8)[:, None],
        scale_table=scale_table.tobytes(),
        scale_block=blocks.nested,
        scale_offset=blocks.offset,
        **shared,
    )


def find_int8(parts: Parts) -> Packed:
    """The module as rows of int8.

    Raises:
        FormatError: its tensors do not fit each other, or not the model's shape.
    """
    parts.need("weight", ("I8",), parts.shape)
    parts.need("SCB", ("F32", "F16", "BF16"), parts.shape[:1])
    how = "int8 weights with SCB; activations stay floats, where bitsandbytes rounds all but outliers"
    found = Found(parts.module, "bitsandbytes-int8", 8, -1, "LLM.int8() channel", how)
    return Packed(found, parts.shape, parts.choose("weight", "SCB"), partial(read_int8, parts=parts))


def read_int8(tensors: Mapping[str, np.ndarray], *, parts: Parts) -> AffineArray:
    """The array, numpy leaves."""
    scale = parts.finite("SCB", tensors["SCB"].astype(np.float32)) * _OF_127
    return affine(tensors["weight"].view(np.uint8) ^ np.uint8(128), scale[:, None], None, 8)
