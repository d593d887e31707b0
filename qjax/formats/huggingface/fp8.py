"""FP8 checkpoints: `weight` in 8-bit floats, and a scale for all of it, a row, a group of a row or a 2-D block.

compressed-tensors calls the scale `weight_scale`, fine-grained FP8 (DeepSeek, Qwen) `weight_scale_inv` though it is no
inverse, FBGEMM `weight_scale`; all are multiplied with. E8M0 scales (MXFP8) are powers of two.
Sources: compressed-tensors' naive_quantized and mxfp8; transformers' integrations/finegrained_fp8.py, fbgemm_fp8.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from qjax.arrays import ScaledFloatArray
from qjax.errors import UnsupportedError
from qjax.formats.huggingface.activations import activations_of
from qjax.formats.huggingface.labels import Said
from qjax.formats.huggingface.parts import FLOATS, Found, Packed, Parts

KINDS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
SCALES = ("weight_scale", "weight_scale_inv")
_E8M0 = ("U8", "F8_E8M0")
# What blocks are, unless the config says something else that fits.
_USUAL = 128


def find(parts: Parts, said: Said) -> Packed:
    """The module as FP8.

    Raises:
        FormatError: its tensors do not fit each other, or not the model's shape.
        UnsupportedError: a scale of a shape that is not known.
    """
    stored = parts.need("weight", KINDS, parts.shape)
    suffix = next((name for name in SCALES if name in parts), None)
    if suffix is None:
        raise parts.wrong(SCALES[0], f"is missing beside {', '.join(parts.stored)}")
    scale = parts.need(suffix, FLOATS + _E8M0)
    out, columns = parts.shape
    lead = scale.shape + (1,) * (2 - len(scale.shape))
    if len(lead) != 2 or not 0 < lead[0] <= out or not 0 < lead[1] <= columns:
        raise parts.wrong(suffix, f"has the shape {scale.shape}, which are no blocks of a weight {parts.shape}")
    rows, width = (
        _block(parts, suffix, length, count, None if said.block is None else said.block[axis])
        for axis, (length, count) in enumerate(zip(parts.shape, lead, strict=True))
    )
    where = {(out, columns): "tensor", (1, columns): "channel"}.get((rows, width), f"block {rows}x{width}")
    where = f"g{width}" if rows == 1 and width < columns else where
    rounding, note = activations_of(parts, said)
    label = f"FP8 {KINDS[stored.dtype].removeprefix('float8_')} {where}{rounding.label}"
    how = f"{stored.dtype} weights; blocks by the shape of {suffix}{note}"
    read = partial(read_fp8, parts=parts, suffix=suffix, rows=rows, block=None if width == columns else width)
    held = parts.choose("weight", suffix, *rounding.suffixes)
    found = Found(parts.module, "fp8", 8, -1 if width == columns else width, label, how)
    return Packed(found, parts.shape, held, rounding.around(read))


def _block(parts: Parts, suffix: str, length: int, count: int, said: int | None) -> int:
    """How long the blocks are of which `count` make `length`, the last perhaps shorter."""
    fits = lambda size: -(-length // size) == count
    if count == length or count == 1:
        return length // count
    if length % count == 0 and said is None and not fits(_USUAL):
        return length // count
    for size in (said, _USUAL):
        if size is not None and fits(size):
            return size
    if length % count == 0:
        return length // count
    raise UnsupportedError(f"{parts.where(suffix)} has {count} blocks of {length}: of what size is not said")


def read_fp8(
    tensors: Mapping[str, np.ndarray], *, parts: Parts, suffix: str, rows: int, block: int | None
) -> ScaledFloatArray:
    """The array, numpy leaves; `rows` share a scale."""
    stored, scale = parts.stored["weight"], tensors[suffix]
    if parts.stored[suffix].dtype in _E8M0:
        # 2**(e - 127), which bfloat16 holds.
        scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127).astype(ml_dtypes.bfloat16)
    scale = parts.finite(suffix, scale).reshape(scale.shape + (1,) * (2 - scale.ndim))
    out = stored.shape[0]
    kind: Any = KINDS[stored.dtype]
    values = np.ascontiguousarray(tensors["weight"])
    biggest = 0x7F if kind == "float8_e4m3fn" else 0x7C
    if (values & np.uint8(0x7F)).max() >= biggest:
        raise parts.wrong("weight", "has numbers that are not finite")
    return ScaledFloatArray(values, np.repeat(scale, rows, axis=0)[:out], kind, block)
