"""What a matrix is quantized to: bits, groups and kind of grid, apart from how the codes are found and stored.

As text: "w4g128" is 4 bits in groups of 128 columns, "w4g128-asym" with zero points, "w8" a scale for each channel
(row), "w8t" one for the whole tensor, "w8a8" with activations rounded to int8, token by token, as well.
"""

import dataclasses
import math
import re
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from qjax.arrays.affine import AffineArray
from qjax.arrays.planes import Layout, Plane, pack, unpack
from qjax.errors import QjaxError

BITS = (2, 3, 4, 5, 6, 8)
# group_size of a scale for each row, and of one for all of a matrix.
CHANNEL, TENSOR = -1, 0
_TEXT = re.compile(r"w(?P<bits>\d)(g(?P<group>\d{1,6})|(?P<tensor>t))?(?P<a8>a8)?(?P<asym>-asym)?")
_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A uniform integer grid for each group of a row: w = scale * (code - zero), codes from 0 to 2**bits - 1.

    bits: of `BITS`. group_size: columns that share a scale; CHANNEL (-1) for a scale a row, TENSOR (0) for one in all.
    symmetric: the zero point of every group is 2**(bits - 1), so that codes less that are -2**(bits - 1) and up; else
      each group has an integer one of its own.
    activations: "int8" for x rounded to int8 with a scale a token, "float" to leave it.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise QjaxError(f"expected bits of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group_size < CHANNEL:
            raise QjaxError(f"expected a group size from 1 on, -1 (a row) or 0 (all), got {self.group_size}")
        if self.activations not in ("float", "int8"):
            raise QjaxError(f"expected activations 'float' or 'int8', got {self.activations!r}")

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """How many groups a row has.

        Raises:
          QjaxError: `columns` are no whole groups.
        """
        if self.group_size <= 0:
            return 1
        if columns % self.group_size:
            raise QjaxError(f"rows of {columns} are no whole groups of {self.group_size}")
        return columns // self.group_size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix [..., out, in]: codes, float16 scales, and zero points of a byte each.

        Raises:
          QjaxError: see `groups`.
        """
        *lead, columns = shape
        return math.prod(lead) * (columns * self.bits // 8 + self.groups(columns) * (2 if self.symmetric else 3))

    def __str__(self) -> str:
        where = {CHANNEL: "", TENSOR: "t"}.get(self.group_size, f"g{self.group_size}")
        return f"w{self.bits}{where}{'a8' * (self.activations == 'int8')}{'-asym' * (not self.symmetric)}"


def parse_scheme(text: str) -> Scheme:
    """The scheme of a text such as "w4g128-asym"; "int4" and "int8" are w4g128 and w8.

    Raises:
      QjaxError: no such form.
    """
    text = {"int4": "w4g128", "int8": "w8"}.get(text, text)
    match = _TEXT.fullmatch(text)
    if match is None:
        raise QjaxError(f"expected a scheme such as w4g128, w4g128-asym, w8 or w8a8, got {text!r}")
    group = TENSOR if match["tensor"] else CHANNEL if match["group"] is None else int(match["group"])
    if match["group"] is not None and group == 0:
        raise QjaxError(f"expected groups of at least one column, got {text!r}")
    return Scheme(int(match["bits"]), group, not match["asym"], "int8" if match["a8"] else "float")


def layout_for(bits: int, columns: int) -> Layout:
    """Planes for codes of so many bits in rows of so many columns: as lanes have them, if the columns allow that.

    Raises:
      QjaxError: columns that fill no whole bytes.
    """
    widths = _WIDTHS[bits]
    if columns % (8 // min(widths)):
        raise QjaxError(f"rows of {columns} codes of {bits} bits fill no whole bytes")
    # A plane of stride s holds chunks of 8 s / width codes: 32 for lanes, fewer for odd rows.
    chunk = next(chunk for chunk in (32, 16, 8, 4, 2, 1) if columns % chunk == 0)
    return tuple(Plane(width, max(width * chunk // 8, 1)) for width in widths)


def affine(
    codes: UInt8[Any, "*lead out in"],
    scale: Float[Any, "*lead out groups"],
    zero: UInt8[Any, "*lead out groups"] | None,
    bits: int,
) -> AffineArray:
    """The array of codes from 0 to 2**bits - 1 and what they mean: scale * (code - zero), zero None for the middle.

    numpy leaves give numpy leaves.

    Raises:
      QjaxError: see `layout_for`.
    """
    xp = np if isinstance(codes, np.ndarray) else jnp
    symmetric = zero is None
    offset = 1 << (bits - 1) if symmetric else 0
    if bits == 8 and symmetric:
        # Stored as int8 values' bytes.
        codes = xp.bitwise_xor(codes, xp.uint8(128))
    layout = layout_for(bits, codes.shape[-1])
    return AffineArray(pack(codes, layout), scale, None, layout, offset, zero)


def codes_of(array: AffineArray) -> UInt8[Any, "*lead out in"]:
    """The unsigned codes, the inverse of `affine`; numpy leaves give numpy leaves."""
    codes = unpack(array.planes, array.layout)
    return codes ^ np.uint8(128) if array.bits == 8 and array.offset == 128 else codes
