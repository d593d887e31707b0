"""Two-level affine family: groups' integer scales under a float scale for each super-block of 256 (K-quants).

Source: ggml's block_q2_K ... block_q6_K and their dequantize_row functions; `gguf.quants` is the oracle.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Integer, UInt8

from qjax.arrays.affine import widen
from qjax.arrays.base import GroupedArray
from qjax.arrays.planes import Layout, Plane, unpack

SUPER_BLOCK = 256

SubScales = tuple[Integer[Array, "... n"], Integer[Array, "... n"] | None]


def _nibbles_with_minimum(packed: UInt8[Array, "... 16"]) -> SubScales:
    """Q2_K: low nibble is the scale, high nibble the minimum."""
    return packed & np.uint8(15), packed >> np.uint8(4)


def _six_bits_with_minimum(packed: UInt8[Array, "... 12"]) -> SubScales:
    """Q4_K and Q5_K: 8 scales and 8 minimums; bytes 0-3 and 4-7 hold the first four of each and the upper two
    bits of the last four, whose lower four are in bytes 8-11."""
    scale, minimum, low = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    last_scale = (low & np.uint8(15)) | ((scale >> np.uint8(2)) & np.uint8(0x30))
    last_minimum = (low >> np.uint8(4)) | ((minimum >> np.uint8(2)) & np.uint8(0x30))
    return (
        jnp.concatenate([scale & np.uint8(63), last_scale], axis=-1),
        jnp.concatenate([minimum & np.uint8(63), last_minimum], axis=-1),
    )


def _six_bits(packed: UInt8[Array, "... 12"]) -> SubScales:
    """Q3_K: 16 scales, less 32; bytes 0-7 hold their lower nibbles, bytes 8-11 their upper two bits."""
    low, high = packed[..., :8], packed[..., 8:]
    low = jnp.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
    high = jnp.concatenate([(high >> np.uint8(s)) & np.uint8(3) for s in (0, 2, 4, 6)], axis=-1)
    return (low | (high << np.uint8(4))).astype(jnp.int8) - np.int8(32), None


def _int8(packed: UInt8[Array, "... 16"]) -> SubScales:
    """Q6_K: 16 signed bytes."""
    return lax.bitcast_convert_type(packed, jnp.int8), None


def _six_bits_split(packed: UInt8[Array, "... 6"]) -> SubScales:
    """IQ4_XS: 8 scales, less 32; a little-endian uint16 of upper two bits, then four bytes of nibbles."""
    high, low = packed[..., :2], packed[..., 2:]
    two = jnp.stack([(high >> np.uint8(s)) & np.uint8(3) for s in (0, 2, 4, 6)], axis=-1)
    nibbles = jnp.stack([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
    *lead, _ = packed.shape
    codes = nibbles.reshape(*lead, 8) | (two.reshape(*lead, 8) << np.uint8(4))
    return codes.astype(jnp.int8) - np.int8(32), None


class Packing(NamedTuple):
    """How a super-block's integer scales lie in `nbytes` bytes, and how many there are."""

    nbytes: int
    count: int
    unpack: Callable[[UInt8[Array, "... nbytes"]], SubScales]


PACKINGS: dict[str, Packing] = {
    "q2_k": Packing(16, 16, _nibbles_with_minimum),
    "q3_k": Packing(12, 16, _six_bits),
    "q4_k": Packing(12, 8, _six_bits_with_minimum),
    "q6_k": Packing(16, 16, _int8),
    "iq4_xs": Packing(6, 8, _six_bits_split),
}


def unpack_sub_scales(packed: UInt8[Array, "... nbytes"], packing: str) -> SubScales:
    """Integer scales and minimums [..., super_blocks, count] of a row's packed bytes."""
    kind = PACKINGS[packing]
    *lead, nbytes = packed.shape
    return kind.unpack(packed.reshape(*lead, nbytes // kind.nbytes, kind.nbytes))


def expand(super_scale: Float[Array, "... sb"], sub: Integer[Array, "... sb n"]) -> Float[Array, "... groups"]:
    """float32 scale of each group: super-scale times integer scale (exact: at most 19 bits)."""
    *lead, blocks, count = sub.shape
    return (widen(super_scale)[..., None] * sub.astype(jnp.float32)).reshape(*lead, blocks * count)


@struct.dataclass(repr=False)
class TwoLevelArray(GroupedArray):
    """w = super_scale * sub_scale * (code - offset) - super_minimum * sub_minimum.

    Leaves (arrays), with sb = in / 256 super-blocks a row:
      planes: tuple of uint8 [..., out, in * width / 8]; see `planes.py`.
      sub_scales: uint8 [..., out, sb * bytes of the packing]: 4- and 6-bit integers, packed as in the file.
      super_scale: float16 [..., out, sb].
      super_minimum: like super_scale, or None.
    Static:
      layout: how the codes lie in the planes.
      packing: how the sub-scales lie in their bytes, a key of PACKINGS.
      offset: subtracted from each code.

    Serves Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.
    """

    planes: Any
    sub_scales: Any
    super_scale: Any
    super_minimum: Any
    layout: Layout = struct.field(pytree_node=False, default=(Plane(4, 32),))
    packing: str = struct.field(pytree_node=False, default="q4_k")
    offset: int = struct.field(pytree_node=False, default=0)

    @property
    def group_size(self) -> int:
        return SUPER_BLOCK // PACKINGS[self.packing].count

    @property
    def column_unit(self) -> int:
        return SUPER_BLOCK

    def codes(self) -> Integer[Array, "... out in"]:
        return unpack(self.planes, self.layout).astype(jnp.int8) - np.int8(self.offset)

    def scales(self) -> Float[Array, "... out groups"]:
        return expand(self.super_scale, unpack_sub_scales(self.sub_scales, self.packing)[0])

    def minimums(self) -> Float[Array, "... out groups"] | None:
        minimum = unpack_sub_scales(self.sub_scales, self.packing)[1]
        return None if minimum is None else -expand(self.super_minimum, minimum)

    def describe(self) -> str:
        kind = "symmetric" if self.super_minimum is None else "with minimum"
        return f"{self.bits}-bit {kind}, groups of {self.group_size} in super-blocks of {SUPER_BLOCK}"
