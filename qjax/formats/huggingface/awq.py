"""AWQ checkpoints' tensors to packed arrays and back, bit for bit.

w[o, i] = scale[o, g] * (q[o, i] - z[o, g]), g = i // group_size; 4 bits, and the zero points are stored as they are.

  "gemm": qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales float16 [groups, out]. The codes of eight
    rows o lie in a word, from its lowest bits up those of 0, 2, 4, 6, 1, 3, 5, 7.
  "gemv": qweight int32 [out, in / 8], qzeros int32 [out, words], scales float16 [out, 8 * words], in plain order, with
    zeros after the last group (see `_padded_words`).

Sources: awq/modules/linear/gemm.py and gemv.py of AutoAWQ; export_to_awq/utils.py of AutoRound.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from qjax.arrays import AffineArray, affine
from qjax.errors import FormatError, UnsupportedError
from qjax.formats.affine_parts import SCALES, AffineParts, affine_parts, half_scales, plain_numpy, zero_or_none
from qjax.formats.huggingface.words import checked, pack_words, unpack_words

BITS = 4
SUFFIXES = ("qweight", "qzeros", "scales")
_IN_WORD = 32 // BITS
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_INVERSE = np.argsort(_ORDER)


@dataclasses.dataclass(frozen=True)
class AWQFacts:
    """What the tensors do not say of themselves.

    version: "gemm" or "gemv". group_size: columns of a group, -1 for all; of "gemm" the tensors say it.
    """

    version: Literal["gemm", "gemv"] = "gemm"
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.version not in ("gemm", "gemv"):
            raise UnsupportedError(f"AWQ of version {self.version!r} is not known; known are gemm and gemv")


def read(tensors: Mapping[str, np.ndarray], facts: AWQFacts) -> AffineArray:
    """A module's weight, numpy leaves.

    Args:
      tensors: by suffix: "qweight", "qzeros", "scales".

    Raises:
      FormatError: a tensor is missing, or its dtype or shape does not fit the others; begins with its suffix.
    """
    qweight, qzeros = checked(tensors, "qweight", ("int32",), 2), checked(tensors, "qzeros", ("int32",), 2)
    scales = checked(tensors, "scales", SCALES, 2)
    rows, words = qweight.shape
    if 0 in (*qweight.shape, *scales.shape):
        raise FormatError(f"qweight is {list(qweight.shape)} and scales {list(scales.shape)}, expected no empty ones")
    codes = unpack_words(qweight, BITS, words * _IN_WORD)
    if facts.version == "gemm":
        columns, groups, out = rows, scales.shape[0], words * _IN_WORD
        expected = {"scales": (groups, out), "qzeros": (groups, words)}
    else:
        columns, out = words * _IN_WORD, rows
        size = columns if facts.group_size <= 0 else facts.group_size
        if columns % size:
            raise FormatError(f"qweight is {list(qweight.shape)}: {columns} columns are no whole groups of {size}")
        groups = columns // size
        # How much padding there is has changed.
        padded = max(qzeros.shape[1], -(-groups // _IN_WORD))
        expected = {"scales": (out, padded * _IN_WORD), "qzeros": (out, padded)}
    for suffix, tensor in (("scales", scales), ("qzeros", qzeros)):
        if tensor.shape != expected[suffix]:
            raise FormatError(f"{suffix} is {list(tensor.shape)}, expected {list(expected[suffix])}, as qweight has it")
    if columns % groups:
        raise FormatError(f"scales is {list(scales.shape)}: {columns} columns are not {groups} groups of one size")
    zeros = unpack_words(qzeros, BITS, qzeros.shape[1] * _IN_WORD)
    if facts.version == "gemm":
        codes, zeros, scales = _by_eights(codes, _INVERSE).T, _by_eights(zeros, _INVERSE).T, scales.T
    else:
        zeros, scales = zeros[:, :groups], scales[:, :groups]
    codes, zeros, scales = (np.ascontiguousarray(part) for part in (codes, zeros, scales))
    return affine(codes, scales, zero_or_none(zeros, BITS), BITS)


def write(array: Any, facts: AWQFacts) -> dict[str, np.ndarray]:
    """The three tensors of a weight, by suffix: the inverse of `read`.

    Raises:
      UnsupportedError: what AWQ does not hold.
    """
    parts = affine_parts(plain_numpy(array), "AWQ")
    columns, order = parts.shape[1], check(parts)
    codes, zeros, scale = parts.codes(), parts.zeros[:, order], half_scales(parts.array.scale, "AWQ")[:, order]
    if facts.version == "gemm":
        codes, zeros, scale = _by_eights(codes.T, _ORDER), _by_eights(zeros.T, _ORDER), scale.T
    else:
        padding = ((0, 0), (0, _padded_words(parts.groups, columns // parts.groups) * _IN_WORD - parts.groups))
        zeros, scale = np.pad(zeros, padding), np.pad(scale, padding)
    return {
        "qweight": pack_words(codes, BITS),
        "qzeros": pack_words(zeros, BITS),
        "scales": np.ascontiguousarray(scale),
    }


def check(parts: AffineParts) -> np.ndarray:
    """The order of groups; UnsupportedError for what AWQ does not hold; `parts` may be of shapes alone."""
    out, columns = parts.shape
    if parts.bits != BITS:
        raise UnsupportedError(f"AWQ has codes of 4 bits, not of {parts.bits}")
    if out % _IN_WORD or columns % _IN_WORD:
        raise UnsupportedError(f"AWQ packs 8 rows and columns together, which {out}x{columns} is not made of")
    order = parts.group_order()
    if order is None:
        raise UnsupportedError("AWQ has columns in their own order alone: save as gptq, or quantize without act-order")
    return order


def _by_eights(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Every eight entries of the last axis in another order."""
    rows, n = codes.shape
    return codes.reshape(rows, n // _IN_WORD, _IN_WORD)[:, :, order].reshape(rows, n)


def _padded_words(groups: int, group_size: int) -> int:
    """Words of a row's zero points in "gemv": so many that kernels read 128 columns' at once."""
    words, multiple = -(-groups // _IN_WORD), max(128 // group_size, 1)
    return -(-words // multiple) * multiple
