"""Scaled float family: 8-bit floats with a scale a row or a 2-D block."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Float32

from qjax.arrays.affine import widen
from qjax.arrays.base import QuantizedArray
from qjax.arrays.planes import Layout, Plane

Float8 = Literal["float8_e4m3fn", "float8_e5m2"]


@struct.dataclass(repr=False)
class ScaledFloatArray(QuantizedArray):
    """w[o, i] = scale[o, i // block] * value[o, i].

    Leaves (arrays):
      values: uint8 [..., out, in], the bits of 8-bit floats (of floats themselves XLA:CPU would make 16-bit ones to cut
        rows).
      scale: float32 (or bfloat16, float16) [..., out, ceil(in / block)]; that of a 2-D block stands in each of its
        rows, that of a whole matrix in all.
    Static:
      kind: what the values are, by JAX's name.
      block: columns that share a scale, the last ones of a row perhaps fewer; None for a scale a row.

    Serves FP8 checkpoints: compressed-tensors' float-quantized, fine-grained (DeepSeek's) and FBGEMM's.
    """

    values: Any
    scale: Any
    kind: Float8 = struct.field(pytree_node=False, default="float8_e4m3fn")
    block: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def planes(self) -> tuple[Any]:
        """The values as codes of 8 bits in one plane."""
        return (self.values,)

    @property
    def layout(self) -> Layout:
        return (Plane(8, 1),)

    @property
    def bits(self) -> int:
        return 8

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.block or self.shape[-1]

    @property
    def column_unit(self) -> int:
        return self.group_size

    def floats(self) -> Float32[Array, "... out in"]:
        """The values without their scales."""
        return lax.bitcast_convert_type(jnp.asarray(self.values), jnp.dtype(self.kind)).astype(jnp.float32)

    def scales(self) -> Float32[Array, "... out blocks"]:
        return widen(jnp.asarray(self.scale))

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        scales, columns = self.scales(), self.shape[-1]
        if self.block is not None:
            scales = jnp.repeat(scales, self.block, axis=-1)[..., :columns]
        return (self.floats() * scales).astype(dtype)

    def describe(self) -> str:
        where = "one scale a channel" if self.block is None else f"a scale for each {self.block} columns"
        return f"{self.kind}, {where}, {self.scale.dtype} scales"
