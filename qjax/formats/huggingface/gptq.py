"""GPTQ checkpoints' tensors to packed arrays and back, bit for bit.

W is [out, in]; the file has it transposed. w[o, i] = scales[g, o] * (q[i, o] - z[g, o]), g = g_idx[i].

  qweight  int32 [in * bits / 32, out]: codes in order of i, a stream of bits down the rows.
  qzeros   int32 [groups, out * bits / 32]: zero points in order of o; version 1 stores z - 1.
  scales   float16 [groups, out].
  g_idx    int32 [in]: the group of each column; i // group_size unless columns were quantized in another order.

A zero point of 0 cannot be told in version 1: 0 - 1 becomes 2**bits - 1 or, where the packer added up signed numbers
(AutoRound, AutoGPTQ 0.7), borrows from the fields above it in the word. Readers differ: AutoGPTQ's make 0 of it again,
those of vLLM and AutoRound 2**bits, and GPTQModel adds the ones to the words as they are, which gives back what was
borrowed. qjax reads as GPTQModel does, 3 bits as AutoGPTQ does (their fields cross words), and writes no such file.

GPTQModel subtracts (and adds) the ones of 3-bit words with the first and third word of each three interchanged; such
files are told by their zero points, if these are symmetric.

Sources: AutoGPTQ's and GPTQModel's packers, qlinear_torch*.py of AutoRound; formats' history in AutoGPTQ pull 640.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from qjax.arrays import AffineArray, TransformedArray, affine
from qjax.errors import FormatError, UnsupportedError
from qjax.formats.affine_parts import SCALES, AffineParts, affine_parts, half_scales, plain_numpy, zero_or_none
from qjax.formats.huggingface.words import checked, pack_words, unpack_words, words_for

BITS = (2, 3, 4, 8)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclasses.dataclass(frozen=True)
class GPTQFacts:
    """What the tensors do not say of themselves.

    bits: of `BITS`. version: 1 (checkpoint_format "gptq": z - 1 is stored) or 2 ("gptq_v2": z is).
    """

    bits: int
    version: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UnsupportedError(f"GPTQ has codes of {', '.join(map(str, BITS))} bits, not of {self.bits}")


def read(tensors: Mapping[str, np.ndarray], facts: GPTQFacts) -> AffineArray | TransformedArray:
    """A module's weight, numpy leaves; columns sorted by group (stable) where g_idx puts them in another order.

    Args:
      tensors: by suffix: "qweight", "qzeros", "scales", and perhaps "g_idx".

    Raises:
      FormatError: a tensor is missing, or its dtype, shape or values do not fit the others; begins with its suffix.
      UnsupportedError: groups of different sizes.
    """
    bits = facts.bits
    qweight, qzeros = checked(tensors, "qweight", ("int32",), 2), checked(tensors, "qzeros", ("int32",), 2)
    scales = checked(tensors, "scales", SCALES, 2)
    g_idx = checked(tensors, "g_idx", ("int32", "int64"), 1) if "g_idx" in tensors else None
    (rows, out), groups = qweight.shape, scales.shape[0]
    columns = rows * 32 // bits if g_idx is None else len(g_idx)
    if columns == 0 or out == 0 or rows != words_for(columns, bits):
        raise FormatError(f"qweight is {list(qweight.shape)}, expected {words_for(columns, bits)} rows of {columns}")
    if scales.shape[1] != out or groups == 0:
        raise FormatError(f"scales is {list(scales.shape)}, expected groups of {out} scales, as qweight has columns")
    if qzeros.shape != (groups, words_for(out, bits)):
        raise FormatError(f"qzeros is {list(qzeros.shape)}, expected {[groups, words_for(out, bits)]}")
    if columns % groups:
        raise UnsupportedError(f"scales is {list(scales.shape)}: {columns} columns are not {groups} groups of one size")
    codes = unpack_words(np.ascontiguousarray(qweight.T), bits, columns)
    order = None if g_idx is None else column_order(g_idx, groups)
    if order is not None:
        codes = np.take(codes, order, axis=1)
    zeros = np.ascontiguousarray(zero_points(qzeros, bits, out, facts.version).T)
    array = affine(codes, np.ascontiguousarray(scales.T), zero_or_none(zeros, bits), bits)
    return array if order is None else TransformedArray(array, columns=order.astype(np.int32))


def write(array: Any, facts: GPTQFacts) -> dict[str, np.ndarray]:
    """The four tensors of a weight, by suffix: the inverse of `read`.

    Raises:
      UnsupportedError: what GPTQ, or this version, does not hold.
    """
    parts = affine_parts(plain_numpy(array), "GPTQ")
    bits, zeros = parts.bits, parts.zeros
    check(parts)
    if bits != facts.bits:
        raise UnsupportedError(f"GPTQ of {facts.bits} bits cannot hold {array!r}")
    if facts.version == 1 and not (zeros > 0).all():
        raise UnsupportedError(
            "GPTQ version 1 stores zero points less 1, and readers differ on those of 0, as here: save as gptq_v2"
        )
    stored = zeros - np.uint8(1) if facts.version == 1 else zeros
    return {
        "qweight": np.ascontiguousarray(pack_words(parts.codes(), bits).T),
        "qzeros": pack_words(stored.T, bits),
        "scales": np.ascontiguousarray(half_scales(parts.array.scale, "GPTQ").T),
        "g_idx": parts.group_of_columns(),
    }


def check(parts: AffineParts) -> None:
    """UnsupportedError for shapes that GPTQ does not hold; `parts` may be of shapes alone."""
    GPTQFacts(parts.bits)
    out, columns = parts.shape
    if columns % 32 or out % 32:
        raise UnsupportedError(f"GPTQ packs 32 rows and columns together, which {out}x{columns} is not made of")


def zero_points(
    qzeros: Int32[np.ndarray, "groups words"], bits: int, out: int, version: Literal[1, 2]
) -> UInt8[np.ndarray, "groups out"]:
    """The zero points that qzeros stands for."""
    if version == 2:
        return unpack_words(qzeros, bits, out)
    if bits != 3:
        return unpack_words(_plus(qzeros, pack_words(np.ones(32 // bits, np.uint8), bits)), bits, out)
    if qzeros.shape[1] % 3 == 0:
        ones = pack_words(np.ones(32, np.uint8), bits)[::-1]
        swapped = unpack_words(_plus(qzeros, np.tile(ones, qzeros.shape[1] // 3)), bits, out)
        if (swapped == 4).all():
            return swapped
    return (unpack_words(qzeros, bits, out) + np.uint8(1)) & np.uint8(7)


def _plus(a: Int32[np.ndarray, "*s"], b: Int32[np.ndarray, " words"]) -> Int32[np.ndarray, "*s"]:
    """Modulo 2**32."""
    return (np.ascontiguousarray(a).view(np.uint32) + b.view(np.uint32)).view(np.int32)


def column_order(g_idx: Integer[np.ndarray, " in"], groups: int) -> Integer[np.ndarray, " in"] | None:
    """The columns sorted by their groups; None if they are so already."""
    size = len(g_idx) // groups
    if np.array_equal(g_idx, np.arange(len(g_idx)) // size):
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise FormatError(
            f"g_idx has groups from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}, as scales"
        )
    counts = np.bincount(g_idx, minlength=groups)
    if (counts != size).any():
        odd = int(np.argmax(counts != size))
        raise UnsupportedError(f"g_idx has {counts[odd]} columns in group {odd}, expected {size} in each")
    return np.argsort(g_idx, kind="stable")
