"""Packed weights with other groups or zero points than GGUF's types have, as one of these where nothing is lost.

  codes      groups      zero points   type
  2, 3 bits  32 columns  any           Q4_0    w = d * (q - zero), d float16: code 8 is 0
  4 bits     32 columns  8             Q4_0    w = d * (q - 8)
  4 bits     32 columns  any           Q4_1    w = d * q + m, m = -d * zero, if float16 holds that exactly
  5 bits     32 columns  16, any       Q5_0, Q5_1
  6 bits     32 columns  any           Q8_0    w = d * q, q int8
  8 bits     32 columns  128           Q8_0

Larger groups of whole 32s (or a scale a row) are as many groups of 32 with one scale.
"""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from qjax.arrays import AffineArray, TransformedArray, affine
from qjax.arrays.planes import pack
from qjax.errors import UnsupportedError
from qjax.formats.affine_parts import AffineParts, affine_parts, plain_numpy, plain_shapes
from qjax.formats.gguf.arrays import BLOCK_TYPES, to_blocks, type_of

_BLOCK = 32
# (bits, has zero points) -> type.
_TYPES = {
    **{(bits, zero): "Q4_0" for bits in (2, 3) for zero in (False, True)},
    (4, False): "Q4_0",
    (4, True): "Q4_1",
    (5, False): "Q5_0",
    (5, True): "Q5_1",
    **{(6, zero): "Q8_0" for zero in (False, True)},
    (8, False): "Q8_0",
}


def type_for(array: Any) -> str:
    """ggml's name of the type that `blocks_of` gives bytes of; by the array's shapes.

    That inputs are rounded is left out: GGUF cannot say it.

    Raises:
      UnsupportedError: no type of GGUF holds it; says why.
    """
    array = _unrounded(array)
    try:
        return type_of(array)
    except UnsupportedError:
        shapes = plain_shapes(array)
        if not isinstance(shapes, AffineArray | TransformedArray):
            raise
        return _affine_type(_checked(shapes).inner if isinstance(shapes, TransformedArray) else shapes)


def blocks_of(array: Any) -> UInt8[np.ndarray, "*rows row_bytes"]:
    """The bytes of an array in the type that `type_for` names.

    Raises:
      UnsupportedError: numbers that this type does not hold exactly.
    """
    array = _unrounded(array)
    try:
        type_of(array)
    except UnsupportedError:
        array = _as_blocks(_in_order(plain_numpy(array)))
    return to_blocks(array)


def _unrounded(array: Any) -> Any:
    if not isinstance(array, TransformedArray) or array.rounding is None:
        return array
    array = array.replace(rounding=None, x_scale=None)  # pyright: ignore[reportAttributeAccessIssue]
    return array.inner if array.columns is None and array.input_scale is None else array


def _checked(array: TransformedArray) -> TransformedArray:
    """UnsupportedError unless columns in whole groups are all that is moved."""
    if array.input_scale is not None:
        raise UnsupportedError("GGUF has no inputs that are scaled: save as qjax, or fold the scale into the norm")
    if affine_parts(array, "GGUF").group_order() is None:
        raise UnsupportedError("GGUF has columns in their own order alone: save as gptq or qjax")
    return array


def _in_order(array: Any) -> Any:
    """The inner one of a transformed array, its columns in the model's order."""
    if not isinstance(array, TransformedArray):
        return array
    parts = affine_parts(_checked(array), "GGUF")
    order = parts.group_order()
    zero = None if parts.array.zero is None else parts.array.zero[:, order]
    return affine(parts.codes(), parts.array.scale[:, order], zero, parts.bits)


def _affine_type(array: Any) -> str:
    """By shapes."""
    parts = affine_parts(array, "GGUF")
    name = _TYPES.get((parts.bits, parts.array.zero is not None))
    if name is None or parts.array.group_size % _BLOCK:
        known = "2 to 6 bits in groups of whole 32s, and 8 bits so without zero points"
        raise UnsupportedError(f"no GGUF type holds {array!r} without loss: there are {known}; save as qjax")
    return name


def _as_blocks(array: AffineArray) -> AffineArray:
    parts, kind = affine_parts(array, "GGUF"), BLOCK_TYPES[_affine_type(array)]
    scale = _half(array.scale.astype(np.float32), f"scales of {array!r}")
    minimum, codes = None, parts.codes()
    if kind.static["offset"]:
        codes = _around(codes, parts, kind.static["offset"])
    else:
        # At most 5 + 11 bits: exact in float32.
        minimum = _half(-scale.astype(np.float32) * array.zero.astype(np.float32), f"scale * zero point of {array!r}")
    spread = lambda leaf: None if leaf is None else np.repeat(leaf, array.group_size // _BLOCK, axis=1)
    return AffineArray(pack(codes, kind.static["layout"]), spread(scale), spread(minimum), **kind.static)


def _around(codes: np.ndarray, parts: AffineParts, middle: int) -> UInt8[np.ndarray, "out in"]:
    """Codes whose zero points are the middle of a type's, as it stores them."""
    if parts.array.zero is not None or middle != 1 << (parts.bits - 1):
        zeros = np.repeat(parts.zeros, parts.array.group_size, axis=1)
        moved = codes.astype(np.int16) - zeros + np.int16(middle)
        if moved.min() < 0 or moved.max() >= 2 * middle:
            raise UnsupportedError(f"no GGUF type holds zero points so far from the codes of {parts.array!r}")
        codes = moved.astype(np.uint8)
    # Those of 8 bits are signed there.
    return codes ^ np.uint8(128 if middle == 128 else 0)


def _half(values: np.ndarray, what: str) -> np.ndarray:
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        raise UnsupportedError(f"GGUF has float16 numbers, which do not hold {what} exactly: save as gptq_v2 or qjax")
    return half
