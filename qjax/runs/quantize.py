"""A float GGUF file to a quantized one, as llama-quantize makes it: mixes, importance, wishes by name."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.api import check_encodable
from qjax.errors import QjaxError
from qjax.formats.gguf import GGUFFile, open_gguf
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.mixes import file_type
from qjax.formats.gguf.plan import Wish, plan
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.locate import locate
from qjax.models.load import read_array
from qjax.quantizers.ggml import Effort, encode
from qjax.quantizers.ggml_legacy import check_finite
from qjax.runs.console import emit, megabytes, show_table


class Planned(NamedTuple):
    """One tensor: what it is and what it becomes."""

    name: str
    shape: tuple[int, ...]
    source: str
    target: str

    @property
    def nbytes(self) -> int:
        """Of the target."""
        size = GGML_TYPES[self.target]
        return math.prod(self.shape) // size.block_size * size.block_bytes


def plan_file(source: str | Path, wish: Wish, *, requantize: bool = False) -> tuple[GGUFFile, list[Planned]]:
    """The file and what would be made of it; reads no weight.

    Raises:
      QjaxError: an unknown mix or type; a type without an encoder, or a quantized source without `requantize`.
    """
    file = open_gguf(locate(source))
    types = plan(file, wish)
    tensors = [Planned(name, info.shape, info.type, types[name]) for name, info in file.tensors.items()]
    changed = [tensor for tensor in tensors if tensor.target != tensor.source]
    for tensor in changed:
        check_encodable(file.path, tensor.name, tensor.target)
        if tensor.source not in FLOAT_TYPES and not requantize:
            raise QjaxError(
                f"{file.path}: {tensor.name} is {tensor.source} already: quantize from a float file, or lose twice "
                "by --allow-requantize"
            )
    return file, tensors


def quantize_file(
    source: str | Path,
    target: str | Path,
    wish: Wish,
    *,
    imatrix: str | Path | None = None,
    requantize: bool = False,
    effort: Effort = "normal",
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Write the quantized file, whole or not at all; a tensor at a time is in memory. Returns `facts` and the path.

    Args:
      effort: see `encode`.

    Raises:
      QjaxError: see `plan_file` and `read_imatrix`; an importance of another length than its weight's rows.
    """
    importances = None if imatrix is None else read_imatrix(imatrix)
    file, tensors = plan_file(source, wish._replace(imatrix=imatrix is not None), requantize=requantize)
    made_anew = {t.name: t.shape for t in tensors if t.target != t.source and t.target not in FLOAT_TYPES}
    columns = {} if importances is None else importances.matched(file.path, made_anew)

    def made(tensor: Planned) -> np.ndarray:
        if tensor.target == tensor.source:
            data = file.raw(tensor.name)
        else:
            w = _floats(file, tensor)
            check_finite(tensor.name, w)
            data = (
                w.view(np.uint8)
                if tensor.target == "F32"
                else encode(tensor.target, w, columns.get(tensor.name), effort)
            )
        file.release(tensor.name)
        progress(tensor.name)
        return data

    metadata = {**file.metadata, "general.file_type": file_type(wish.mix), "general.quantization_version": 2}
    types = {**file.metadata_types, "general.file_type": "u32", "general.quantization_version": "u32"}
    if importances is not None:
        metadata |= {
            "quantize.imatrix.file": str(imatrix),
            "quantize.imatrix.entries_count": len(importances.of),
            "quantize.imatrix.chunks_count": importances.chunks,
        }
        if importances.datasets:
            metadata["quantize.imatrix.dataset"] = importances.datasets[0]
    writes = [TensorToWrite(t.name, t.shape, t.target, functools.partial(made, t)) for t in tensors]
    write_gguf(target, metadata, writes, metadata_types=types)
    return {"path": str(target), **facts(tensors)}


def _floats(file: GGUFFile, tensor: Planned) -> np.ndarray:
    if tensor.source in FLOAT_TYPES:
        floats = file.raw(tensor.name).view(FLOAT_TYPES[tensor.source])
        return floats.astype(np.float32) if tensor.target == "F32" else floats
    array = read_array(file, tensor.name, apply_scale=False)
    return np.asarray(jax.tree.map(jnp.asarray, array).dequantize())


def facts(tensors: list[Planned]) -> dict[str, Any]:
    """Sizes and types of a plan, for `--json`."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "parameters": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights if weights else 0.0,
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "from": t.source, "to": t.target, "bytes": t.nbytes}
            for t in tensors
        ],
    }


def show(result: dict[str, Any]) -> None:
    """The plan as a table."""
    rows = [
        (t["name"], " x ".join(map(str, t["shape"])), t["from"], t["to"], f"{t['bytes']:,}") for t in result["tensors"]
    ]
    show_table("", ["tensor", "shape", "from", "to", "bytes"], rows)
    emit(f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight\n")
