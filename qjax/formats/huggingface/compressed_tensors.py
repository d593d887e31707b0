"""compressed-tensors checkpoints, as llm-compressor writes them, to packed arrays.

  pack-quantized: weight_packed int32 [out, words], codes q + 2**(bits - 1) as a stream of bits (older versions: as many
    whole codes a word as fit); weight_scale [out, groups], [out, 1] or one number; weight_shape [2]; weight_zero_point
    packed likewise along out, or int8 [out, groups]; weight_g_idx int32 [in] where columns were put in another order.
  int-quantized, naive-quantized: weight int8 [out, in], weight_scale, weight_zero_point int8.
  mxfp4-pack-quantized, nvfp4-pack-quantized: weight_packed uint8 [out, in / 2] of E2M1, the first in the low bits;
    weight_scale uint8 (E8M0) [out, in / 32], or FP8 [out, in / 16] over weight_global_scale.
float-quantized is in fp8.py. w = (q - zero) * scale.

Source: compressed_tensors/compressors of version 0.19.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from qjax.arrays import AffineArray, CodebookArray, FloatCodebookArray, TransformedArray, affine
from qjax.arrays.codebook import E2M1_VALUES
from qjax.arrays.planes import Plane, pack, unpack
from qjax.arrays.scheme import BITS, layout_for
from qjax.errors import UnsupportedError
from qjax.formats.affine_parts import zero_or_none
from qjax.formats.huggingface.activations import activations_of
from qjax.formats.huggingface.gptq import column_order
from qjax.formats.huggingface.labels import Said
from qjax.formats.huggingface.parts import FLOATS, Found, Packed, Parts
from qjax.formats.huggingface.words import unpack_words, words_for

# Of codes: 7-bit ones are kept in 8.
_BITS = (*BITS, 7)


def find_packed(parts: Parts, said: Said) -> Packed:
    """The module as pack-quantized, or one of the 4-bit floats.

    Raises:
        FormatError: its tensors do not fit each other, or not the model's shape.
        UnsupportedError: bits or groups that no array has.
    """
    packed = parts.need("weight_packed", ("I32", "U8"))
    if packed.dtype == "U8":
        return _find_float4(parts, said)
    out, columns = parts.shape
    if "weight_shape" in parts:
        parts.need("weight_shape", ("I64", "I32"), (2,))
        shape = tuple(int(n) for n in parts.read("weight_shape"))
        if shape != parts.shape:
            raise parts.wrong("weight_shape", f"is {shape}, expected {parts.shape} by config.json")
    if len(packed.shape) != 2 or packed.shape[0] != out:
        raise parts.wrong("weight_packed", f"has the shape {packed.shape}, expected {out} rows")
    bits, dense = _bits(parts, packed.shape[1], columns, said)
    groups = _groups(parts)
    kinds = "asym" if _zero_kind(parts, bits, groups) else ""
    order = _order(parts, groups)
    rounding, note = activations_of(parts, said)
    words = [f"{bits}-bit", _where(groups, columns), kinds, "act-order" if order is not None else ""]
    label = f"pack-quantized {' '.join(word for word in words if word)}{rounding.label}"
    how = f"bits by the shape of weight_packed, groups by that of weight_scale{note}"
    if bits == 7:
        how += "; its 7-bit codes take 8 bits in memory"
    held = parts.choose("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", *rounding.suffixes)
    read = partial(read_packed, parts=parts, bits=bits, dense=dense, groups=groups)
    found = Found(parts.module, "pack-quantized", bits, -1 if groups == 1 else columns // groups, label, how)
    return Packed(found, parts.shape, held, rounding.around(read))


def find_int8(parts: Parts, said: Said) -> Packed:
    """The module as int-quantized (or naive-quantized, which is the same in the file).

    Raises:
        FormatError: its tensors do not fit each other, or not the model's shape.
    """
    parts.need("weight", ("I8",), parts.shape)
    groups = _groups(parts)
    kind = "asym" if _zero_kind(parts, 8, groups) else ""
    rounding, note = activations_of(parts, said)
    words = ["int8", _where(groups, parts.shape[1]), kind]
    label = f"int-quantized {' '.join(word for word in words if word)}{rounding.label}"
    how = f"int8 weights, groups by the shape of weight_scale{note}"
    held = parts.choose("weight", "weight_scale", "weight_zero_point", *rounding.suffixes)
    read = partial(read_int8, parts=parts, groups=groups)
    found = Found(parts.module, "int-quantized", 8, -1 if groups == 1 else parts.shape[1] // groups, label, how)
    return Packed(found, parts.shape, held, rounding.around(read))


def _bits(parts: Parts, words: int, columns: int, said: Said) -> tuple[int, bool]:
    """Bits of a code, and whether codes cross the borders of words: by how many words a row has."""
    fitting = [(bits, True) for bits in range(1, 9) if words_for(columns, bits) == words]
    fitting += [(bits, False) for bits in (3, 5, 6, 7) if -(-columns // (32 // bits)) == words]
    agreed = [found for found in fitting if found[0] == said.bits] or fitting
    if not agreed:
        raise parts.wrong("weight_packed", f"has {words} words a row: {columns} codes of no number of bits fill these")
    if agreed[0][0] not in _BITS:
        raise UnsupportedError(f"{parts.where('weight_packed')} has codes of {agreed[0][0]} bit, known are {BITS}")
    return agreed[0]


def _groups(parts: Parts) -> int:
    """How many scales a row has."""
    out, columns = parts.shape
    scale = parts.need("weight_scale", FLOATS)
    if scale.shape in ((), (1,), (1, 1)):
        return 1
    if scale.shape == (out,):
        return 1
    if len(scale.shape) != 2 or scale.shape[0] != out or scale.shape[1] == 0 or columns % scale.shape[1]:
        raise parts.wrong("weight_scale", f"has the shape {scale.shape}, which are no groups of a weight {parts.shape}")
    return scale.shape[1]


def _where(groups: int, columns: int) -> str:
    return "channel" if groups == 1 else f"g{columns // groups}"


def _zero_kind(parts: Parts, bits: int, groups: int) -> str:
    """How the zero points are stored, "" for none."""
    if "weight_zero_point" not in parts:
        return ""
    out = parts.shape[0]
    rows = words_for(out, bits), -(-out // (32 // bits))
    whole = ((out, groups), *(((), (1,), (1, 1), (out,)) if groups == 1 else ()))
    zero = parts.need("weight_zero_point", ("I32", "I8", "U8"))
    if zero.dtype == "I32":
        parts.need("weight_zero_point", ("I32",), (rows[0], groups), (rows[1], groups))
        return "dense" if zero.shape[0] == rows[0] else "padded"
    parts.need("weight_zero_point", ("I8", "U8"), *whole)
    return "plain"


def _order(parts: Parts, groups: int) -> np.ndarray | None:
    """The columns sorted by group, None if they are so."""
    if "weight_g_idx" not in parts:
        return None
    parts.need("weight_g_idx", ("I32", "I64"), parts.shape[1:])
    g_idx = parts.read("weight_g_idx")
    # What it is before anything is put in order.
    if (g_idx == -1).all():
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        problem = f"has groups from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}"
        raise parts.wrong("weight_g_idx", problem)
    try:
        return column_order(g_idx, groups)
    except UnsupportedError as error:
        raise UnsupportedError(f"{parts.where('weight_g_idx')}: {error}") from error


def _unpack(words: np.ndarray, bits: int, count: int, dense: bool) -> UInt8[np.ndarray, "*lead n"]:
    if dense:
        return unpack_words(words, bits, count)
    codes = unpack_words(words[..., None], bits, 32 // bits)
    return codes.reshape(*words.shape[:-1], -1)[..., :count]


def _scales(tensors: Mapping[str, np.ndarray], parts: Parts, groups: int) -> np.ndarray:
    scale = parts.finite("weight_scale", tensors["weight_scale"])
    rows = scale.reshape(-1, groups) if scale.size > 1 else scale.reshape(1, 1)
    return np.ascontiguousarray(np.broadcast_to(rows, (parts.shape[0], groups)))


def _zeros(tensors: Mapping[str, np.ndarray], parts: Parts, bits: int, groups: int) -> np.ndarray | None:
    """Zero points of unsigned codes."""
    kind = _zero_kind(parts, bits, groups)
    if not kind:
        return None
    zero, out = tensors["weight_zero_point"], parts.shape[0]
    if kind != "plain":
        return _unpack(np.ascontiguousarray(zero.T), bits, out, kind == "dense").T
    middle = 1 << (bits - 1)
    shifted = np.broadcast_to(zero.astype(np.int16).reshape(-1, groups), (out, groups)) + np.int16(middle)
    if shifted.min() < 0 or shifted.max() >= 1 << bits:
        least, most = shifted.min() - middle, shifted.max() - middle
        raise parts.wrong("weight_zero_point", f"has numbers from {least} to {most}, which {bits} bits do not hold")
    return shifted.astype(np.uint8)


def read_packed(
    tensors: Mapping[str, np.ndarray], *, parts: Parts, bits: int, dense: bool, groups: int
) -> AffineArray | TransformedArray:
    """The array, numpy leaves."""
    codes = _unpack(np.ascontiguousarray(tensors["weight_packed"]), bits, parts.shape[1], dense)
    order = _order(parts, groups)
    if order is not None:
        codes = np.take(codes, order, axis=1)
    zeros = _zeros(tensors, parts, bits, groups)
    if bits == 7:
        codes, bits = codes + np.uint8(64), 8
        zeros = None if zeros is None else zeros + np.uint8(64)
    zeros = None if zeros is None else zero_or_none(np.ascontiguousarray(zeros), bits)
    array = affine(codes, _scales(tensors, parts, groups), zeros, bits)
    return array if order is None else TransformedArray(array, columns=order.astype(np.int32))


def read_int8(tensors: Mapping[str, np.ndarray], *, parts: Parts, groups: int) -> AffineArray:
    """The array, numpy leaves."""
    zeros = _zeros(tensors, parts, 8, groups)
    zeros = None if zeros is None else zero_or_none(zeros, 8)
    codes = tensors["weight"].view(np.uint8) ^ np.uint8(128)
    return affine(codes, _scales(tensors, parts, groups), zeros, 8)


def _find_float4(parts: Parts, said: Said) -> Packed:
    """MXFP4 or NVFP4, by whether there is a global scale."""
    out, columns = parts.shape
    parts.need("weight_packed", ("U8",), (out, columns // 2))
    nv = "weight_global_scale" in parts
    group = 16 if nv else 32
    parts.need("weight_scale", ("F8_E4M3",) if nv else ("U8", "F8_E8M0"), (out, columns // group))
    if columns % group:
        raise parts.wrong("weight_scale", f"has groups of {group}, which do not divide rows of {columns}")
    note = "; activations stay floats" if said.activations else ""
    kind = "nvfp4-pack-quantized" if nv else "mxfp4-pack-quantized"
    found = Found(
        parts.module, kind, 4, group, f"{'NVFP4' if nv else 'MXFP4'} g{group}", f"weight_packed of bytes{note}"
    )
    held = parts.choose("weight_packed", "weight_scale", "weight_global_scale")
    return Packed(found, parts.shape, held, partial(_read_nvfp4 if nv else _read_mxfp4, parts=parts))


def _codes4(tensors: Mapping[str, np.ndarray], columns: int) -> dict[str, Any]:
    layout = layout_for(4, columns)
    codes = unpack((np.ascontiguousarray(tensors["weight_packed"]),), (Plane(4, 1),))
    return {"planes": pack(codes, layout), "layout": layout}


def _read_mxfp4(tensors: Mapping[str, np.ndarray], *, parts: Parts) -> CodebookArray:
    scale = np.ascontiguousarray(tensors["weight_scale"])
    codes = _codes4(tensors, parts.shape[1])
    return CodebookArray(scale=scale, sub_scales=None, table=E2M1_VALUES, scale_kind="e8m0", **codes)


def _read_nvfp4(tensors: Mapping[str, np.ndarray], *, parts: Parts) -> FloatCodebookArray:
    out, columns = parts.shape
    parts.need("weight_global_scale", FLOATS, (), (1,))
    divisor = parts.finite("weight_global_scale", tensors["weight_global_scale"]).astype(np.float32).reshape(1, 1)
    if not divisor > 1e-30:
        raise parts.wrong("weight_global_scale", f"is {divisor[0, 0]}, expected a positive number")
    factor = np.float32(1) / divisor
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.ascontiguousarray(tensors["weight_scale"])
    if not np.isfinite(every[scale]).all():
        raise parts.wrong("weight_scale", "has numbers that are not finite")
    return FloatCodebookArray(
        scale=scale,
        super_scale=np.repeat(factor, out, axis=0),
        start=np.zeros((out, 1), np.uint8),
        table=tuple(value / 2 for value in E2M1_VALUES),
        scale_table=np.nan_to_num(every).tobytes(),
        scale_block=columns // 16,
        **_codes4(tensors, columns),
    )
