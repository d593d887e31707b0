"""What a safetensors file begins with, and its names of numpy's dtypes; see `checkpoint.py` for the format."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qjax.errors import UnsupportedError

# Names in the file -> numpy's dtypes.
NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
_NAMES = {kind: name for name, kind in NUMPY.items()}


class TensorSpec(NamedTuple):
    """A tensor to be written: its numbers are numpy's `dtype`, little-endian, row by row."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(name: str, array: Any) -> TensorSpec:
    """The spec of an array, or of what has its dtype and shape."""
    return TensorSpec(name, np.dtype(array.dtype), tuple(array.shape))


def header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON: all that stands before the data of these tensors, one after another.

    Raises:
      UnsupportedError: a dtype that the format does not have.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for spec in specs:
        if spec.dtype not in _NAMES:
            raise UnsupportedError(f"{spec.name}: safetensors files have no {spec.dtype}")
        end = start + spec.nbytes
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces, so that the data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_of(array: Any) -> bytes:
    """An array's numbers as they lie in a file."""
    return np.ascontiguousarray(array).tobytes()
