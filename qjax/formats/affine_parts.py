"""A packed weight taken apart into what affine formats store: codes, scales, zero points, order of columns."""

import functools
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32, Integer, UInt8

from qjax.arrays import AffineArray, LaneBlockedArray, Partitioned, QuantizedArray, TransformedArray, codes_of
from qjax.errors import UnsupportedError

# Of scales, as files have them.
SCALES = ("float16", "bfloat16", "float32")


class AffineParts(NamedTuple):
    """w[o, columns[j]] = scale[o, g] * (code[o, j] - zero[o, g]), g = j // group_size.

    array: the codes in groups; it may be one of shapes alone, but for what gives codes or zero points. columns: int32
    [in], None for all in order.
    """

    array: AffineArray
    columns: Integer[np.ndarray, " in"] | None

    @property
    def bits(self) -> int:
        return self.array.bits

    @property
    def shape(self) -> tuple[int, int]:
        out, columns = self.array.shape
        return out, columns

    @property
    def groups(self) -> int:
        return self.array.scale.shape[1]

    @property
    def zeros(self) -> UInt8[np.ndarray, "out groups"]:
        """The zero points, written out where they are the middle."""
        middle = 1 << (self.bits - 1)
        return np.full(self.array.scale.shape, middle, np.uint8) if self.array.zero is None else self.array.zero

    def codes(self) -> UInt8[np.ndarray, "out in"]:
        """The unsigned codes in the order of the model's columns."""
        codes = codes_of(self.array)
        if self.columns is None:
            return codes
        restored = np.empty_like(codes)
        restored[:, self.columns] = codes
        return restored

    def group_of_columns(self) -> Int32[np.ndarray, " in"]:
        """The group that each of the model's columns is in."""
        groups = np.arange(self.shape[1], dtype=np.int32) // np.int32(self.array.group_size)
        if self.columns is not None:
            groups[self.columns] = groups.copy()
        return groups

    def group_order(self) -> Int32[np.ndarray, " groups"] | None:
        """The groups in the order of the model's columns; None if the columns of one are no neighbours there."""
        groups = self.group_of_columns().reshape(self.groups, -1)
        return groups[:, 0] if (groups == groups[:, :1]).all() else None


def plain_numpy(array: Any) -> Any:
    """An array with its rows side by side and numpy leaves, whatever mesh or layout it lies in."""
    array = jax.tree.map(np.asarray, _whole(array))
    return array.plain() if isinstance(array, LaneBlockedArray | TransformedArray) else array


def plain_shapes(array: Any) -> Any:
    """What `plain_numpy` gives, of shapes alone but for the order of columns; nothing is computed."""
    array = _whole(array)
    if isinstance(array, TransformedArray):
        return array.replace(inner=plain_shapes(array.inner))  # pyright: ignore[reportAttributeAccessIssue]
    leaves, tree = jax.tree.flatten(array)
    return _plain_shapes(tree, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves))


@functools.lru_cache(maxsize=256)
def _plain_shapes(tree: Any, leaves: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]) -> Any:
    array = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(lambda a: a.plain() if isinstance(a, QuantizedArray) else a, array)


def _whole(array: Any) -> Any:
    return array.weight if isinstance(array, Partitioned) else array


def affine_parts(array: Any, format_name: str) -> AffineParts:
    """Take a 2-D array, plain, apart; a rounding of activations is not looked at.

    Raises:
      UnsupportedError: it is of another family, or has what no affine checkpoint has; `format_name` is named.
    """
    columns, inner = None, array
    if isinstance(array, TransformedArray):
        if array.input_scale is not None:
            raise UnsupportedError(f"{format_name} has no scale of inputs: fold it into the norm or weights before")
        columns, inner = array.columns, array.inner
    if not isinstance(inner, AffineArray):
        raise UnsupportedError(f"{format_name} cannot hold {inner!r}: it has integer codes under one scale a group")
    if inner.ndim != 2 or inner.minimum is not None:
        what = "a minimum a group" if inner.minimum is not None else f"{inner.ndim} axes"
        raise UnsupportedError(f"{format_name} cannot hold {inner!r}: it has {what}")
    middle = 1 << (inner.bits - 1)
    if inner.offset != (middle if inner.zero is None else 0):
        raise UnsupportedError(f"{format_name} cannot hold {inner!r}: its codes are shifted by {inner.offset}")
    return AffineParts(inner, None if columns is None else np.asarray(columns))


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
