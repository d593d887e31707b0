"""Codebook family: 4-bit indices into a table of 16 values, with a scale a group."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Integer

from qjax.arrays.affine import widen
from qjax.arrays.base import GroupedArray
from qjax.arrays.floats import e8m0_half_to_f32, scale_by_power_of_two
from qjax.arrays.planes import Layout, Plane, unpack
from qjax.arrays.two_level import SUPER_BLOCK, expand, unpack_sub_scales

# ggml's kvalues_iq4nl: the non-linear 4-bit grid of IQ4_NL and IQ4_XS.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 (OCP Microscaling Formats v1.0), doubled so that it is integer.
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@struct.dataclass(repr=False)
class CodebookArray(GroupedArray):
    """w = scale * table[code].

    Leaves (arrays):
      planes: tuple of one uint8 [..., out, in / 2]; see `planes.py`.
      scale: by `scale_kind`:
        "float": float16 [..., out, groups];
        "e8m0": uint8 [..., out, groups], the power of two 2**(e - 128) (half of OCP's, for the doubled table);
        "two_level": float16 [..., out, in / 256], times the 6-bit integers of `sub_scales`.
      sub_scales: uint8 [..., out, in / 256 * 6] for "two_level", else None.
    Static: layout, table (16 small integers), scale_kind.

    Serves IQ4_NL ("float"), MXFP4 ("e8m0"), IQ4_XS ("two_level").
    """

    planes: Any
    scale: Any
    sub_scales: Any
    layout: Layout = struct.field(pytree_node=False, default=(Plane(4, 16),))
    table: tuple[int, ...] = struct.field(pytree_node=False, default=IQ4_VALUES)
    scale_kind: str = struct.field(pytree_node=False, default="float")

    @property
    def group_size(self) -> int:
        return 32 if self.scale_kind == "two_level" else self.shape[-1] // self.scale.shape[-1]

    @property
    def column_unit(self) -> int:
        return SUPER_BLOCK if self.scale_kind == "two_level" else self.group_size

    def codes(self) -> Integer[Array, "... out in"]:
        index = unpack(self.planes, self.layout)
        return jnp.asarray(self.table, jnp.int8)[index]

    def scales(self) -> Float[Array, "... out groups"]:
        if self.scale_kind == "two_level":
            return expand(self.scale, unpack_sub_scales(self.sub_scales, "iq4_xs")[0])
        if self.scale_kind == "e8m0":
            return e8m0_half_to_f32(self.scale)
        return widen(self.scale)

    def minimums(self) -> Float[Array, "... out groups"] | None:
        return None

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        if self.scale_kind != "e8m0":
            return super().dequantize(dtype)
        # Products may be subnormal, which XLA:CPU's multiplication flushes.
        codes = self.codes()
        *lead, n = codes.shape
        grouped = codes.reshape(*lead, self.scale.shape[-1], -1).astype(jnp.float32)
        exponents = jnp.broadcast_to(self.scale.astype(jnp.int32)[..., None] - 128, grouped.shape)
        return scale_by_power_of_two(grouped, exponents).reshape(*lead, n).astype(dtype)

    def describe(self) -> str:
        kind = {"float": "float16", "e8m0": "power-of-two", "two_level": "two-level"}[self.scale_kind]
        return f"4-bit codebook, groups of {self.group_size}, {kind} scales"
