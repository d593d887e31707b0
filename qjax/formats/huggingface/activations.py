"""How a checkpoint has activations rounded: dynamic ones a token, fixed ones by its input_scale."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qjax.arrays import TransformedArray
from qjax.arrays.transformed import Rounding
from qjax.formats.huggingface.labels import Said
from qjax.formats.huggingface.parts import FLOATS, Parts

_ROUNDINGS: dict[tuple[Any, Any], Rounding] = {(8, "int"): "int8", (8, "float"): "float8_e4m3fn"}
# compressed-tensors' and AutoFP8's name, and transformers'.
_FIXED = ("input_scale", "activation_scale")
Read = Callable[[Mapping[str, np.ndarray]], Any]


class Activations(NamedTuple):
    """What x is rounded to, None for nothing; the tensor of the fixed scale, if there is one."""

    rounding: Rounding | None
    suffix: str | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        return () if self.suffix is None else (self.suffix,)

    @property
    def label(self) -> str:
        if self.rounding is None:
            return ""
        return f", {'FP8' if self.rounding != 'int8' else 'int8'} activations{' fixed' if self.suffix else ''}"

    def around(self, read: Read) -> Read:
        """`read`, with its array's input rounded."""
        return read if self.rounding is None else partial(_read, read=read, activations=self)


def _read(tensors: Mapping[str, np.ndarray], *, read: Read, activations: Activations) -> TransformedArray:
    array = read(tensors)
    fixed = None
    if activations.suffix is not None:
        fixed = tensors[activations.suffix].astype(np.float32).reshape(())
    if isinstance(array, TransformedArray):
        return array.replace(x_scale=fixed, rounding=activations.rounding)  # pyright: ignore[reportAttributeAccessIssue]
    return TransformedArray(array, x_scale=fixed, rounding=activations.rounding)


def activations_of(parts: Parts, said: Said) -> tuple[Activations, str]:
    """How a module's activations are rounded, and what is to be said of it where that is not as the file has it.

    Only the config knows of dynamic rounding. Left out, x stays as it is: nearer to the float model than the file asks.

    Raises:
        FormatError: a fixed scale that is no positive number.
    """
    wanted = said.activations
    if not wanted:
        unused = "; input_scale is not used: the config rounds no activations" if _FIXED[0] in parts else ""
        return Activations(None), unused
    what = f"{wanted.get('type', 'int')}{wanted.get('num_bits', 8)}"
    rounding = _ROUNDINGS.get((wanted.get("num_bits", 8), wanted.get("type", "int")))
    if rounding is None:
        return Activations(None), f"; activations stay floats: {what} is not known"
    if wanted.get("strategy") in ("group", "tensor_group", "block"):
        return Activations(None), f"; activations stay floats: {what} with a scale for each group of x is not known"
    if wanted.get("symmetric") is False:
        return Activations(None), f"; activations stay floats: {what} with zero points is not known"
    suffix = next((name for name in _FIXED if name in parts), None)
    if wanted.get("dynamic") in (True, "local") or suffix is None:
        fixed = "" if wanted.get("dynamic") else "; the fixed scale of activations is missing: a scale a token instead"
        tensor = "; a scale a token, where the file has one for all" if wanted.get("strategy") == "tensor" else ""
        return Activations(rounding), fixed or tensor
    stored = parts.need(suffix, FLOATS)
    scale = parts.read(suffix).astype(np.float32).reshape(-1)
    if stored.shape not in ((), (1,), (1, 1)) or not 0 < scale[0] < np.inf:
        raise parts.wrong(suffix, f"has the shape {stored.shape}, expected one positive number")
    if "input_zero_point" in parts and parts.read("input_zero_point").astype(np.float32).any():
        return Activations(None), f"; activations stay floats: {what} with zero points is not known"
    return Activations(rounding, suffix), "; activations by " + suffix
