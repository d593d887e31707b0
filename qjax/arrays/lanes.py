"""The lane-blocked layout: 16 rows side by side, as the CPU kernels read them (kernels/native/src/core.h, same text).

A tile is 16 rows of the weight (the last tile is filled up with rows that are computed and dropped), a step 32
columns (the last step is filled up with columns for which x is taken as zero). With T tiles and S steps:

  planes[i], of `width` w bits a code: uint8 [T, S, w, 64]. Byte 4 * lane + c of vector v of a step holds, at bits
    [w * p, w * p + w), the code of row 16 t + lane and column 32 s + 4 * (v + w * p) + c, for p = 0 ... 8 / w - 1.
    The first plane holds the lowest bits. Codes are unsigned; `offset` is subtracted from them.
  scale, minimum, zero: [T, G, 16]: entry [t, g, lane] is that of row 16 t + lane and group g. G = ceil(columns /
    group_size), one more where groups of 16 would end in half a step.
  sub: uint8 [T, SB * B, 16]: byte b of super-block sb of row 16 t + lane at [t, sb * B + b, lane]; the B bytes of a
    super-block are those of qjax/arrays/two_level.py.

Put another way: the bytes of each row's `Plane(w, 4 * w)`, in words of 4, with the words of 16 rows side by side; and
each number of a group with those of 16 rows side by side.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Integer, UInt8

from qjax.arrays.affine import AffineArray
from qjax.arrays.base import GroupedArray, QuantizedArray
from qjax.arrays.float_codebook import FloatCodebookArray
from qjax.arrays.planes import Layout, Plane, pack_plane, unpack_plane
from qjax.arrays.scaled_float import ScaledFloatArray

LANES, STEP, WORD = 16, 32, 4
WIDTHS = frozenset([(8,), (4,), (2,), (2, 1), (4, 1), (4, 2)])

# repack(bytes [rows, bytes of a row], plane, columns, flip) -> uint8 [T, S * 64 * width]; flip is xored into each byte.
Repack = Callable[[np.ndarray, Plane, int, int], np.ndarray]
Empty = Callable[[tuple[int, ...], Any], np.ndarray]

# Tiles repacked at a time: what is unpacked of them stays in a core's cache.
_TILES_TOGETHER = 8


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def _step_plane(plane: Plane) -> Plane:
    """The layout of one row of which lanes are made: a step is a chunk, its bytes are in the order of the vectors."""
    return Plane(plane.width, WORD * plane.width)


@struct.dataclass(repr=False)
class LaneBlockedArray(QuantizedArray):
    """A grouped array, or one of floats that codes stand for, in the lane-blocked layout.

    Leaves (arrays), all those of `inner`, with T = ceil(out / 16) tiles and S = ceil(in / 32) steps:
      planes: uint8 [..., T, S * 64 * width]; 8-bit codes with offset 128 as unsigned codes.
      scale, minimum, zero, super_scale, super_minimum: [..., T, groups or super-blocks * 16].
      sub_scales: uint8 [..., T, bytes of a row * 16].
    Static:
      inner's: what they are in the plain array, `layout` included.
      padding: rows of the last tile that are dropped.
      columns_padding: columns of the last step that are dropped.

    Other than the base says, a leaf's axis -2 is tiles: leaves can be cut by tiles, and by steps that hold whole
    groups, if there is no padding on that side. `inner` is a container of leaves, never to be computed with.
    """

    inner: Any
    padding: int = struct.field(pytree_node=False, default=0)
    columns_padding: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, tiles, nbytes = self.inner.planes[0].shape
        steps = nbytes // (LANES * WORD * self.inner.layout[0].width)
        return (*lead, tiles * LANES - self.padding, steps * STEP - self.columns_padding)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.inner.bits

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        # inner has 16 times as many columns and groups; one group of all columns may have got padding.
        return min(self.inner.group_size, self.shape[-1])

    @property
    def column_unit(self) -> int:
        return math.lcm(STEP, self.inner.column_unit)

    def plain(self) -> Any:
        """The array this was made of, bit for bit; numpy leaves give numpy leaves."""
        rows, columns = self.shape[-2:]
        held = jax.tree.map(lambda leaf: leaf[..., :rows, :], self._rows(_all_rows))
        layout = self.inner.layout
        planes = tuple(_from_steps(*pair, columns) for pair in zip(held.planes, layout, strict=True))
        rest = _with(held, ())
        if self.group_size == LANES and self.columns_padding:
            rest = jax.tree.map(lambda leaf: leaf[..., :-1], rest)
        return _with(rest, planes, layout)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        rows, columns = self.shape[-2:]
        return jax.tree.map(jnp.asarray, self)._rows(_all_rows).dequantize(dtype)[..., :rows, :columns]

    def take(self, rows: Integer[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, "... in"]:
        if self.ndim != 2:
            raise ValueError(f"expected a 2-D array to take rows from, got shape {self.shape}")
        out, columns = self.shape
        flat = jnp.clip(rows.reshape(-1).astype(jnp.int32), 0, out - 1)
        tile, lane = flat // LANES, flat % LANES

        def chosen(leaf: Any, word: int) -> Any:
            return jnp.asarray(_words(leaf, word))[tile, :, lane].reshape(flat.size, leaf.shape[-1] // LANES)

        return self._rows(chosen).dequantize(dtype)[:, :columns].reshape(*rows.shape, columns)

    def map_rows(self, f: Callable[[Any], Any]) -> Any:
        return self.plain().map_rows(f)

    def describe(self) -> str:
        # In the words of the plain array; it takes no more than its shapes.
        return f"{jax.eval_shape(LaneBlockedArray.plain, self).describe()}, in lanes"

    def _rows(self, pull: Callable[[Any, int], Any]) -> Any:
        """Rows as `pull(leaf, elements of a word)` has them, with the padding columns, in step planes."""
        flip = _flip(self.inner)
        planes = tuple(pull(data, WORD) for data in self.inner.planes)
        if flip:
            planes = tuple(data ^ np.uint8(flip) for data in planes)
        rest = jax.tree.map(lambda leaf: pull(leaf, 1), _with(self.inner, ()))
        return _with(rest, planes, tuple(_step_plane(plane) for plane in self.inner.layout))


def _with(array: Any, planes: tuple[Any, ...], layout: Layout | None = None) -> Any:
    """The array with other planes of codes, and perhaps in another layout."""
    if isinstance(array, ScaledFloatArray):
        # One plane of whole bytes, which have no other layout.
        return array.replace(values=planes[0] if planes else None)  # pyright: ignore[reportAttributeAccessIssue]
    return array.replace(planes=planes, layout=array.layout if layout is None else layout)


def _flip(array: Any) -> int:
    """8-bit codes with offset 128 are unsigned in lanes, two's complement in the plain array."""
    return 0x80 if isinstance(array, AffineArray) and array.bits == 8 and array.offset == 128 else 0


def _words(leaf: Any, word: int) -> Any:
    """A leaf as [..., T, words of a row, lane, word]."""
    *lead, n = leaf.shape
    return leaf.reshape(*lead, n // (LANES * word), LANES, word)


def _all_rows(leaf: Any, word: int) -> Any:
    *lead, tiles, n = leaf.shape
    return _words(leaf, word).swapaxes(-3, -2).reshape(*lead, tiles * LANES, n // LANES)


def _from_steps(rows: UInt8[Any, "*lead _"], plane: Plane, columns: int) -> UInt8[Any, "*lead nbytes"]:
    """Rows in step planes, without the padding columns, in the layout `plane`."""
    step = _step_plane(plane)
    if plane.stride == step.stride and columns % STEP == 0:
        return rows
    if isinstance(rows, np.ndarray) and rows.ndim == 2 and len(rows) > _TILES_TOGETHER * LANES:
        # A few at a time: of a whole plane the unpacked codes would be several times as large.
        parts = range(0, len(rows), _TILES_TOGETHER * LANES)
        return np.concatenate([_from_steps(rows[i : i + parts.step], plane, columns) for i in parts])
    return pack_plane(unpack_plane(rows, step)[..., :columns], plane)


def _to_steps(rows: np.ndarray, plane: Plane, columns: int) -> np.ndarray:
    """The inverse of `_from_steps`, with codes 0 in the padding columns."""
    step, padding = _step_plane(plane), -columns % STEP
    if padding == 0 and (plane.width == 8 or plane.stride == step.stride):
        return rows
    return pack_plane(np.pad(unpack_plane(rows, plane), ((0, 0), (0, padding))), step)


def _side_by_side(rows: np.ndarray) -> np.ndarray:
    """[out, n] -> [T, n, 16], zeros in the rows that fill up the last tile."""
    out, n = rows.shape
    tiles = _ceil(out, LANES)
    filled = np.pad(rows, ((0, tiles * LANES - out), (0, 0))) if out % LANES else rows
    return filled.reshape(tiles, LANES, n).transpose(0, 2, 1)


def repack(data: np.ndarray, plane: Plane, columns: int, flip: int) -> np.ndarray:
    """One plane's bytes [out, bytes of a row] in lanes, uint8 [T, S * 64 * width]; flip is xored into each byte."""
    tiles, words = _ceil(data.shape[0], LANES), _ceil(columns, STEP) * plane.width
    lanes = np.empty((tiles, words, LANES), np.uint32)
    for first in range(0, tiles, _TILES_TOGETHER):
        last = first + _TILES_TOGETHER
        rows = np.ascontiguousarray(_to_steps(data[first * LANES : last * LANES], plane, columns))
        lanes[first:last] = _side_by_side(rows.view(np.uint32))
    in_bytes = lanes.view(np.uint8).reshape(tiles, words * LANES * WORD)
    return np.bitwise_xor(in_bytes, np.uint8(flip), out=in_bytes) if flip else in_bytes


def serves_lanes(array: Any) -> str | None:
    """None if `to_lanes` takes the array, else what it has that lanes have not."""
    if not isinstance(array, GroupedArray | ScaledFloatArray | FloatCodebookArray):
        return f"{type(array).__name__} has no planes of codes with a scale a group"
    if array.ndim != 2:
        return f"{array.ndim} axes, not 2"
    if array.size == 0:
        return "no weights"
    if tuple(plane.width for plane in array.layout) not in WIDTHS:
        return f"planes of {' + '.join(str(plane.width) for plane in array.layout)} bits"
    columns, group = array.shape[-1], array.group_size
    if group != 16 and group % STEP and group != columns:
        return f"groups of {group}: neither 16, nor a multiple of {STEP}, nor all {columns} columns"
    if isinstance(array, ScaledFloatArray):
        if array.kind == "float8_e4m3fn" and ((np.asarray(array.values) & np.uint8(0x7F)) == 0x7F).any():
            return "values that are no numbers"
    elif array.bits == 8 and (not isinstance(array, AffineArray) or array.offset not in (0, 128)):
        return "8-bit codes with an offset that is neither 0 nor 128"
    return None


def to_lanes(array: Any, repack: Repack = repack, empty: Empty = np.empty) -> LaneBlockedArray:
    """The array in lanes, with numpy leaves.

    Args:
      array: one that `serves_lanes`; its leaves (numpy, memory maps, or JAX arrays of this process) are only read.
      repack: what brings one plane into lanes.
      empty: `empty(shape, dtype)` makes the arrays of the other leaves.

    Raises:
      ValueError: lanes do not serve the array.
    """
    reason = serves_lanes(array)
    if reason is not None:
        raise ValueError(f"expected an array that lanes serve, got {array!r}: {reason}")
    held: Any = jax.tree.map(np.asarray, array)
    out, columns = held.shape
    half_step = held.group_size == LANES and columns % STEP

    def numbers(leaf: np.ndarray) -> np.ndarray:
        filled = np.pad(leaf, ((0, 0), (0, 1))) if half_step else leaf
        lanes = _side_by_side(filled)
        own = empty(lanes.shape, lanes.dtype)
        own[...] = lanes
        return own.reshape(lanes.shape[0], -1)

    planes = tuple(
        repack(data, plane, columns, _flip(held)).reshape(_ceil(out, LANES), -1)
        for data, plane in zip(held.planes, held.layout, strict=True)
    )
    inner = _with(jax.tree.map(numbers, _with(held, ())), planes)
    return LaneBlockedArray(inner, padding=-out % LANES, columns_padding=-columns % STEP)
