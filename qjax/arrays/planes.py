"""Bit planes: how codes of 2 to 8 bits lie in bytes.

A code of `bits` bits is cut into planes of 8, 4, 2 or 1 bits, lowest bits first; each plane is an array of
bytes of its own, so no bit is wasted: 5 bits are a plane of 4 and a plane of 1. Within a plane, `stride` bytes
hold one chunk of `stride * 8 / width` consecutive codes: byte k of a chunk holds codes k, k + stride,
k + 2 stride, ..., from its lowest bits up. ggml's types are of this shape as they are (Q4_0: width 4, stride 16;
Q6_K: width 4, stride 64 and width 2, stride 32), and long strides are what vector units want: one load, then
shifts and masks of whole vectors.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8


class Plane(NamedTuple):
    """One plane: `width` bits of each code; a chunk is `stride` bytes."""

    width: int
    stride: int

    @property
    def per_byte(self) -> int:
        return 8 // self.width

    @property
    def chunk(self) -> int:
        """Codes in one chunk: the finest border at which in_features may be cut."""
        return self.stride * self.per_byte


Layout = tuple[Plane, ...]


def layout_bits(layout: Layout) -> int:
    """Bits of one code."""
    return sum(plane.width for plane in layout)


def _shifts(plane: Plane, xp: Any) -> Any:
    return xp.arange(plane.per_byte, dtype=xp.uint8)[:, None] * xp.uint8(plane.width)


def unpack_plane(data: UInt8[Any, "... nbytes"], plane: Plane) -> UInt8[Any, "... n"]:
    """The plane's bits of every code, as uint8 below 2**width. Takes JAX and numpy arrays alike."""
    if plane.width == 8:
        return data
    xp = np if isinstance(data, np.ndarray) else jnp
    *lead, nbytes = data.shape
    chunks = data.reshape(*lead, nbytes // plane.stride, 1, plane.stride)
    shifts = _shifts(plane, xp).reshape(*(1,) * (len(lead) + 1), plane.per_byte, 1)
    codes = (chunks >> shifts) & xp.uint8((1 << plane.width) - 1)
    return codes.reshape(*lead, nbytes * plane.per_byte)


def pack_plane(bits: UInt8[Any, "... n"], plane: Plane) -> UInt8[Any, "... nbytes"]:
    """The inverse of `unpack_plane`; n must be a multiple of the plane's chunk."""
    if plane.width == 8:
        return bits
    xp = np if isinstance(bits, np.ndarray) else jnp
    *lead, n = bits.shape
    if n % plane.chunk:
        raise ValueError(f"expected a multiple of {plane.chunk} codes, got {n}")
    chunks = bits.reshape(*lead, n // plane.chunk, plane.per_byte, plane.stride)
    shifts = _shifts(plane, xp).reshape(*(1,) * (len(lead) + 1), plane.per_byte, 1)
    # Bits of different codes do not overlap, so the sum is their union.
    packed = (chunks << shifts).sum(axis=-2, dtype=xp.uint8)
    return packed.reshape(*lead, n // plane.per_byte)


def unpack(planes: tuple[UInt8[Any, "... _"], ...], layout: Layout) -> UInt8[Any, "... n"]:
    """Codes, uint8, from all planes of a layout."""
    codes, shift = None, 0
    for data, plane in zip(planes, layout, strict=True):
        bits = unpack_plane(data, plane)
        codes = bits if codes is None else codes | (bits << np.uint8(shift))
        shift += plane.width
    if codes is None:
        raise ValueError("expected at least one plane, got none")
    return codes


def pack(codes: UInt8[Any, "... n"], layout: Layout) -> tuple[UInt8[Any, "... _"], ...]:
    """Planes from codes below 2**bits: the inverse of `unpack`."""
    planes, shift = [], 0
    for plane in layout:
        planes.append(pack_plane((codes >> np.uint8(shift)) & np.uint8((1 << plane.width) - 1), plane))
        shift += plane.width
    return tuple(planes)
