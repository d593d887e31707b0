"""Packed arrays as compressed-tensors' tensors, which llm-compressor writes and vLLM prefers.

"pack-quantized" (weights alone):
  weight_packed      int32 [out, ceil(in * bits / 32)]: codes from 0 to 2**bits - 1, a stream of bits along a row.
  weight_scale       float16 [out, groups].
  weight_shape       int64 [2].
  weight_zero_point  int32 [ceil(out * bits / 32), groups], if there are any: a stream of bits down the rows.
  weight_g_idx       int32 [in]: the group of each column, if those of a group are no neighbours.
"int-quantized" (activations rounded to int8 too): weight int8 [out, in], codes less 2**(bits - 1); weight_scale;
  weight_zero_point int8 [out, groups], less as much; input_scale float32 [1], if it is fixed.

Source: compressed_tensors/compressors/pack_quantized and naive_quantized of vllm-project/compressed-tensors 0.19, which
has dropped weight_g_idx; vLLM and earlier versions have it.
"""

from typing import Any

import numpy as np

from qjax.arrays import TransformedArray
from qjax.errors import UnsupportedError
from qjax.formats.affine_parts import affine_parts, half_scales, plain_numpy
from qjax.formats.huggingface.words import pack_words

NAME = "compressed-tensors"


def write(array: Any) -> dict[str, np.ndarray]:
    """The tensors of a weight, by suffix: "int-quantized" if its input is rounded, else "pack-quantized".

    Raises:
      UnsupportedError: what compressed-tensors does not hold.
    """
    array = plain_numpy(array)
    parts, order = affine_parts(array, NAME), None
    if parts.columns is not None:
        order = parts.group_order()
    in_order = lambda leaf: leaf if order is None else np.ascontiguousarray(leaf[:, order])
    scale = in_order(half_scales(parts.array.scale, NAME))
    zero = None if parts.array.zero is None else in_order(parts.array.zero)
    moved = parts.columns is not None and order is None
    if rounding_of(array) == "int8":
        if moved:
            raise UnsupportedError("int-quantized has columns in their own order alone: quantize without act-order")
        middle = np.int16(1 << (parts.bits - 1))
        signed = lambda codes: (codes.astype(np.int16) - middle).astype(np.int8)
        tensors = {"weight": signed(parts.codes()), "weight_scale": scale}
        if zero is not None:
            tensors["weight_zero_point"] = signed(zero)
        if array.x_scale is not None:
            tensors["input_scale"] = np.asarray(array.x_scale, np.float32).reshape(1)
        return tensors
    tensors = {
        "weight_packed": pack_words(parts.codes(), parts.bits),
        "weight_scale": scale,
        "weight_shape": np.array(parts.shape, np.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_words(zero.T, parts.bits).T)
    if moved:
        tensors["weight_g_idx"] = parts.group_of_columns()
    return tensors


def rounding_of(array: Any) -> str | None:
    """What a weight's input is rounded to.

    Raises:
      UnsupportedError: to something else than int8.
    """
    rounding = array.rounding if isinstance(array, TransformedArray) else None
    if rounding not in (None, "int8"):
        raise UnsupportedError(f"{NAME} with integer weights rounds activations to int8, not to {rounding}")
    return rounding
