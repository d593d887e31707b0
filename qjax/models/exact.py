"""What a tensor of a source becomes in a GGUF file if nothing of it is to change."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from qjax.arrays import TransformedArray
from qjax.errors import QjaxWarning, UnsupportedError
from qjax.formats.gguf.from_affine import blocks_of, type_for
from qjax.formats.source import Source


def kept_types(source: Source, names: Iterable[str]) -> dict[str, str]:
    """ggml's types that hold the tensors as they are. One packed in another way is read to see whether its numbers fit.

    That activations are to be rounded a GGUF file cannot say: it is left out, with a warning.

    Raises:
      UnsupportedError: no type does; names the tensor.
    """
    types, rounded = {}, []
    for name in names:
        types[name] = source.tensors[name].type
        if name in source.found:
            array = source.array(name)
            if rounds_inputs(array):
                rounded.append(name)
            types[name] = _exact_type(source, name, array)
            source.release(name)
    warn_unrounded(source.path, rounded)
    return types


def rounds_inputs(array: Any) -> bool:
    """Whether a weight's activations are to be rounded, which no GGUF file can say."""
    return isinstance(array, TransformedArray) and array.rounding is not None


def warn_unrounded(path: Path, names: Sequence[str]) -> None:
    """Say once of which weights `path` leaves the rounding of activations out."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text = f"{path}: {names[0]}{more}: a GGUF file cannot say that activations are rounded: left out"
        warnings.warn(text, QjaxWarning, stacklevel=3)


def _exact_type(source: Source, name: str, array: Any) -> str:
    try:
        return _exact(array)[0]
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{source.path}: {name} is {source.found[name].label}: {error}; or make floats of it by --type f16, or "
            "lose twice by `qjax quantize --allow-requantize`"
        ) from error


def kept_bytes(source: Source, name: str, kind: str) -> UInt8[np.ndarray, "*rows row_bytes"] | None:
    """A packed tensor's bytes in the type `kind`, if that holds it as it is; else None."""
    try:
        found, data = _exact(source.array(name))
    except UnsupportedError:
        return None
    return data if found == kind else None


def _exact(array: Any) -> tuple[str, UInt8[np.ndarray, "*rows row_bytes"]]:
    return type_for(array), blocks_of(array)
