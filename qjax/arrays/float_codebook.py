"""Float codebook family: 4-bit indices into a table of 16 floats, with a scale a group that may be packed itself."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, UInt8

from qjax.arrays.base import QuantizedArray
from qjax.arrays.planes import Layout, Plane, unpack


@struct.dataclass(repr=False)
class FloatCodebookArray(QuantizedArray):
    """w = table[code] * scale[group].

    Leaves (arrays):
      planes: tuple of one uint8 [..., out, in / 2]; see `planes.py`.
      scale: float32 [..., out, groups]; or uint8, packed ones (QLoRA's double quantization), which stand for
        scale_table[scale[o, g]] * super_scale[o, (start[o] + g) // scale_block] + scale_offset.
      super_scale: float32 [..., out, n], of the blocks of packed scales that a row takes part in; else None.
      start: uint8 [..., out, 1], where in its first such block the row begins; else None.
    Static:
      layout; table: the 16 values; scale_table: bytes of 256 float32 numbers (bytes hash once); scale_block,
        scale_offset.

    Serves bitsandbytes' NF4 and FP4 (Dettmers et al. 2023, "QLoRA").
    """

    planes: Any
    scale: Any
    super_scale: Any = None
    start: Any = None
    layout: Layout = struct.field(pytree_node=False, default=(Plane(4, 16),))
    table: tuple[float, ...] = struct.field(pytree_node=False, default=())
    scale_table: bytes = struct.field(pytree_node=False, default=b"")
    scale_block: int = struct.field(pytree_node=False, default=256)
    scale_offset: float = struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, nbytes = self.planes[0].shape
        return (*lead, nbytes * self.layout[0].per_byte)

    @property
    def bits(self) -> int:
        return 4

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def column_unit(self) -> int:
        # Where a row begins in its block of packed scales would change with a cut.
        if self.super_scale is not None:
            return self.shape[-1]
        return int(np.lcm(self.group_size, self.layout[0].chunk))

    def codes(self) -> UInt8[Any, "... out in"]:
        """Indices into the table."""
        return unpack(self.planes, self.layout)

    def scales(self) -> Float32[Array, "... out groups"]:
        """float32 scale of each group."""
        if self.super_scale is None:
            return jnp.asarray(self.scale)
        place = jnp.arange(self.scale.shape[-1], dtype=jnp.int32).reshape((1,) * (self.scale.ndim - 1) + (-1,))
        block = (jnp.asarray(self.start).astype(jnp.int32) + place) // self.scale_block
        table = jnp.asarray(np.frombuffer(self.scale_table, np.float32))
        product = table[self.scale] * jnp.take_along_axis(jnp.asarray(self.super_scale), block, axis=-1)
        # Nothing but an operation between keeps XLA:CPU from one multiply-add, which rounds once instead of twice.
        product = jnp.maximum(product, jnp.finfo(jnp.float32).min)
        return product + jnp.float32(self.scale_offset)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        values, scales = jnp.asarray(self.table, jnp.float32)[self.codes()], self.scales()
        *lead, n = values.shape
        w = values.reshape(*lead, scales.shape[-1], -1) * scales[..., None]
        return w.reshape(*lead, n).astype(dtype)

    def describe(self) -> str:
        kind = "float32" if self.super_scale is None else "8-bit"
        return f"4-bit float codebook, groups of {self.group_size}, {kind} scales"
