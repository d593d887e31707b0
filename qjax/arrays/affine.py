"""Affine family: integer codes under one float scale (and minimum or zero point) a group."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Integer

from qjax.arrays.base import GroupedArray
from qjax.arrays.floats import f16_to_f32
from qjax.arrays.planes import Layout, Plane, unpack


@jax.custom_jvp
def _exact(half: Any) -> Any:
    return f16_to_f32(half)


@_exact.defjvp
def _(primals: Any, tangents: Any) -> Any:
    # Made of integer operations, which have no derivative; the conversion is the identity.
    return _exact(*primals), tangents[0].astype(jnp.float32)


def widen(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """A stored scale as float32, exactly (XLA's own f16 conversion may flush or canonicalize)."""
    return _exact(scale) if scale.dtype == jnp.float16 else scale.astype(jnp.float32)


@struct.dataclass(repr=False)
class AffineArray(GroupedArray):
    """w = scale * (code - offset - zero) + minimum.

    In float32 the integers are subtracted first and the scale multiplies once: no rounding but that product's.

    Leaves (arrays):
      planes: tuple of uint8 [..., out, in * width / 8], one for each plane of `layout`; see `planes.py`.
      scale: float16 (or bfloat16, float32) [..., out, groups]; groups = 1 is one scale a channel.
      minimum: like scale, or None.
      zero: uint8 [..., out, groups], the integer zero point of each group, or None.
    Static:
      layout: how the codes lie in the planes.
      offset: subtracted from each unsigned code. 8-bit codes with offset 128 are stored as their int8 values'
        bytes (two's complement), so that no kernel has to shift them.

    Serves Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, and with zero points GPTQ, AWQ and compressed-tensors.
    """

    planes: Any
    scale: Any
    minimum: Any
    layout: Layout = struct.field(pytree_node=False, default=(Plane(4, 16),))
    offset: int = struct.field(pytree_node=False, default=0)
    zero: Any = None

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def column_unit(self) -> int:
        return int(np.lcm.reduce([self.group_size, *(plane.chunk for plane in self.layout)]))

    def codes(self) -> Integer[Array, "... out in"]:
        codes = unpack(self.planes, self.layout)
        if self.bits == 8:
            if self.offset not in (0, 128):
                raise ValueError(f"expected offset 0 or 128 of 8-bit codes, got {self.offset}")
            return lax.bitcast_convert_type(codes, jnp.int8) if self.offset == 128 else codes
        return codes.astype(jnp.int8) - np.int8(self.offset)

    def scales(self) -> Float[Array, "... out groups"]:
        return widen(self.scale)

    def minimums(self) -> Float[Array, "... out groups"] | None:
        minimum = None if self.minimum is None else widen(self.minimum)
        if self.zero is None:
            return minimum
        shift = -(self.scales() * self.zero.astype(jnp.float32))
        return shift if minimum is None else shift + minimum

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        if self.zero is None:
            return super().dequantize(dtype)
        # Not by way of `minimums`: scale * code - scale * zero would round twice.
        codes, (scales, minimum) = self.codes(), self.replace(zero=None).group_scales()  # pyright: ignore[reportAttributeAccessIssue]
        *lead, n = codes.shape
        grouped = codes.reshape(*lead, scales.shape[-1], -1).astype(jnp.float32)
        w = scales[..., None] * (grouped - self.zero.astype(jnp.float32)[..., None])
        if minimum is not None:
            w = w + minimum[..., None]
        return w.reshape(*lead, n).astype(dtype)

    def describe(self) -> str:
        groups = self.scale.shape[-1]
        where = "one scale a channel" if groups == 1 else f"groups of {self.group_size}"
        kinds = [name for name in ("minimum", "zero") if getattr(self, name) is not None]
        kind = f"with {' and '.join(kinds)}" if kinds else "symmetric"
        return f"{self.bits}-bit {kind}, {where}, {self.scale.dtype} scales"
