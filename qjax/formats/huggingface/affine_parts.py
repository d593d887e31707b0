"""A packed weight taken apart into what every affine format stores: codes, scales, zero points, order of columns."""

from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Integer, UInt8

from qjax.arrays import AffineArray, LaneBlockedArray, Partitioned, TransformedArray, codes_of
from qjax.errors import UnsupportedError

# Of scales, as files have them.
SCALES = ("float16", "bfloat16", "float32")


class AffineParts(NamedTuple):
    """w[o, columns[j]] = scale[o, g] * (codes[o, j] - zero[o, g]), g = j // group_size.

    codes: uint8 [out, in]. scale: [out, groups]. zero: uint8 [out, groups], None for 2**(bits - 1) everywhere.
    columns: int [in], None for all in order.
    """

    codes: UInt8[np.ndarray, "out in"]
    scale: Float[np.ndarray, "out groups"]
    zero: UInt8[np.ndarray, "out groups"] | None
    columns: Integer[np.ndarray, " in"] | None
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def zeros(self) -> UInt8[np.ndarray, "out groups"]:
        """The zero points, written out where they are the middle."""
        return np.full(self.scale.shape, 1 << (self.bits - 1), np.uint8) if self.zero is None else self.zero

    def in_order(self) -> UInt8[np.ndarray, "out in"]:
        """The codes in the order of the model's columns."""
        if self.columns is None:
            return self.codes
        codes = np.empty_like(self.codes)
        codes[:, self.columns] = self.codes
        return codes


def plain_numpy(array: Any) -> Any:
    """An array with its rows side by side and numpy leaves, whatever mesh or layout it lies in."""
    if isinstance(array, Partitioned):
        array = array.weight
    array = jax.tree.map(np.asarray, array)
    return array.plain() if isinstance(array, LaneBlockedArray | TransformedArray) else array


def affine_parts(array: Any, format_name: str) -> AffineParts:
    """Take a 2-D array apart; a rounding of activations is not looked at.

    Raises:
      UnsupportedError: it is of another family, or has what no affine checkpoint has; `format_name` is named.
    """
    array = plain_numpy(array)
    columns = None
    if isinstance(array, TransformedArray):
        if array.input_scale is not None:
            raise UnsupportedError(f"{format_name} has no scale of inputs: fold it into the norm or weights before")
        columns, array = array.columns, array.inner
    if not isinstance(array, AffineArray):
        raise UnsupportedError(f"{format_name} cannot hold {array!r}: it has codes under one scale a group")
    if array.ndim != 2 or array.minimum is not None:
        what = "a minimum a group" if array.minimum is not None else f"{array.ndim} axes"
        raise UnsupportedError(f"{format_name} cannot hold {array!r}: it has {what}")
    middle = 1 << (array.bits - 1)
    if array.offset != (middle if array.zero is None else 0):
        raise UnsupportedError(f"{format_name} cannot hold {array!r}: its codes are shifted by {array.offset}")
    return AffineParts(codes_of(array), array.scale, array.zero, columns, array.bits)


def half_scales(scale: Float[np.ndarray, "out groups"], format_name: str) -> Float[np.ndarray, "out groups"]:
    """Scales as 16-bit floats, which readers expect.

    Raises:
      UnsupportedError: float32 ones that float16 does not hold exactly.
    """
    if scale.dtype in (np.float16, ml_dtypes.bfloat16):
        return scale
    half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale):
        raise UnsupportedError(f"{format_name} has float16 scales, which do not hold these float32 ones exactly")
    return half


def zero_or_none(zeros: UInt8[np.ndarray, "out groups"], bits: int) -> UInt8[np.ndarray, "out groups"] | None:
    """Zero points as `affine` takes them: None if all are the middle."""
    return None if (zeros == 1 << (bits - 1)).all() else zeros
