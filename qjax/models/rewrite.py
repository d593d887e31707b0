"""A source to a GGUF file, tensor by tensor: as it is, every matrix to one type, or by one of llama.cpp's mixes."""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.mixes import file_type, is_mix
from qjax.formats.gguf.plan import Wish, plan
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.pieces import Resume, fingerprint
from qjax.formats.source import Source
from qjax.models.exact import kept_bytes, kept_types, rounds_inputs, warn_unrounded
from qjax.models.load import checked_config, read_array, warn_kept
from qjax.quantizers.ggml import TYPES as ENCODED
from qjax.quantizers.ggml import Effort, encode
from qjax.quantizers.ggml_legacy import check_finite
from qjax.version import __version__

# What every matrix can become, whatever its place; with llama.cpp's general.file_type for each.
PLAIN_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "bf16": 32,
}

Progress = Callable[[str], None]


class Output(NamedTuple):
    """How the file is written.

    split_max_bytes: see `write_gguf`. fresh: begin anew, whatever a killed run has done. resumed: told how many
    tensors, of how many, such a run has done already, if any.
    """

    split_max_bytes: int | None = None
    fresh: bool = False
    resumed: Callable[[int, int], None] = lambda done, total: None


AS_ONE_FILE = Output()


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


def planned(source: Source, types: Mapping[str, str]) -> list[Planned]:
    """The tensors of a source with the types that they shall have."""
    return [Planned(name, info.shape, info.type, types[name]) for name, info in source.tensors.items()]


def plain_type(type_name: str) -> str:
    """ggml's name of a plain type, from any case.

    Raises:
      QjaxError: it is none of them.
    """
    if type_name.lower() not in PLAIN_TYPES:
        known = ", ".join(PLAIN_TYPES)
        raise QjaxError(f"cannot quantize to {type_name!r}; known are {known}, and llama.cpp's mixes such as q4_k_m")
    return type_name.upper()


def names_mix(kind: str) -> bool:
    """Whether this is a mix; of a name that is a plain type's too, such as q4_0, every matrix gets that type."""
    return kind.lower() not in PLAIN_TYPES and is_mix(kind)


def whole_rows(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The plain type for a matrix; F16, with a warning that names it, where rows do not hold whole blocks."""
    block = GGML_TYPES[kind].block_size
    if shape[-1] % block == 0:
        return kind
    warnings.warn(
        f"{name}: rows of {shape[-1]} are not whole {kind} blocks of {block}; kept as F16", QjaxWarning, stacklevel=3
    )
    return "F16"


def check_quantizable(source: Source) -> None:
    """QjaxError unless there is a float matrix."""
    if not any(info.type in FLOAT_TYPES and len(info.shape) == 2 for info in source.tensors.values()):
        raise QjaxError(f"{source.path}: every matrix is quantized already; quantize from a float file")


def check_encodable(path: Path, name: str, kind: str) -> None:
    """UnsupportedError naming the tensor if there is no encoder of its type."""
    if kind != "F32" and kind not in ENCODED:
        raise UnsupportedError(
            f"{path}: {name} would become {kind}, which qjax does not make yet; known are {', '.join(ENCODED)}"
        )


def check_encoders(source: Source, tensors: list[Planned]) -> None:
    """UnsupportedError naming the first tensor that would change to a type without an encoder."""
    for tensor in tensors:
        if tensor.target != tensor.source:
            check_encodable(source.path, tensor.name, tensor.target)


def plan_plain(source: Source, type_name: str) -> list[Planned]:
    """Every float matrix to one type; a warning names those that are quantized already and stay.

    Those that are packed as no ggml type is become floats if the type is one of floats.

    Raises:
      QjaxError: an unknown type, or all matrices are quantized already, or in a way that GGUF has no type for.
    """
    wanted = plain_type(type_name)
    floats = wanted in FLOAT_TYPES
    if not (floats and source.found):
        check_quantizable(source)
    types, kept = {}, []
    for name, info in source.tensors.items():
        if len(info.shape) == 2 and (info.type in FLOAT_TYPES or (floats and name in source.found)):
            types[name] = whole_rows(name, info.shape, wanted)
        else:
            kept.append(name)
            if len(info.shape) == 2:
                warn_kept(name, info.type)
    return planned(source, types | kept_types(source, kept))


def plan_mix(source: Source, wish: Wish, *, requantize: bool = False) -> list[Planned]:
    """What llama-quantize would make of the source.

    Raises:
      QjaxError: an unknown mix or type, or a quantized source without `requantize`.
    """
    tensors = planned(source, plan(source, wish))
    for tensor in tensors:
        if tensor.target != tensor.source and tensor.source not in FLOAT_TYPES and not requantize:
            raise QjaxError(
                f"{source.path}: {tensor.name} is {tensor.source} already: quantize from a float file, or lose twice "
                "by `qjax quantize --allow-requantize`"
            )
    return tensors


def rewrite(
    source: Source,
    target: str | Path,
    tensors: list[Planned],
    *,
    metadata: Mapping[str, Any],
    metadata_types: Mapping[str, str],
    importances: Mapping[str, np.ndarray] | None = None,
    effort: Effort = "normal",
    output: Output = AS_ONE_FILE,
    progress: Progress = lambda name: None,
) -> list[Path]:
    """Write the file or its shards, whole or not at all; a tensor at a time is in memory. Returns what was written.

    What a killed run of the same has done is not done again. `progress` is told each tensor's name when it is made, or
    found.

    Raises:
      QjaxError: weights that are not finite, or, of a Hugging Face folder, tensors that do not fit its config.
    """
    importances = importances or {}
    if source.path.is_dir():
        # No converter has looked at it before.
        checked_config(source)
    done: list[str] = []
    unrounded: list[str] = []

    def made(tensor: Planned) -> np.ndarray:
        for name in done:
            source.release(name)
        done[:] = [tensor.name]
        data = _bytes(source, tensor, importances.get(tensor.name), effort, unrounded)
        progress(tensor.name)
        return data

    writes = [TensorToWrite(t.name, t.shape, t.target, functools.partial(made, t)) for t in tensors]

    def resumed(done: int, total: int) -> None:
        output.resumed(done, total)
        for tensor in tensors[:done]:
            progress(tensor.name)

    importance = hashlib.sha256()
    for name, column in importances.items():
        importance.update(name.encode("utf-8", "surrogatepass") + np.ascontiguousarray(column).tobytes())
    facts = (__version__, [tensor.source for tensor in tensors], importance.hexdigest(), effort)
    files = write_gguf(
        target,
        metadata,
        writes,
        metadata_types=metadata_types,
        split_max_bytes=output.split_max_bytes,
        resume=Resume(fingerprint(source.files, *facts), output.fresh, resumed),
    )
    warn_unrounded(source.path, unrounded)
    return files


def _bytes(
    source: Source, tensor: Planned, importance: np.ndarray | None, effort: Effort, unrounded: list[str]
) -> np.ndarray:
    """The tensor's bytes; its name goes to `unrounded` if a rounding of activations is left out, which `kept_types` has
    not told."""
    if tensor.target == tensor.source:
        return source.raw(tensor.name)
    if tensor.name in source.found and (kept := kept_bytes(source, tensor.name, tensor.target)) is not None:
        return kept
    if tensor.source in FLOAT_TYPES:
        w = source.raw(tensor.name).view(FLOAT_TYPES[tensor.source])
    else:
        packed = read_array(source, tensor.name, apply_scale=False)
        if rounds_inputs(packed):
            unrounded.append(tensor.name)
        w = np.asarray(jax.tree.map(jnp.asarray, packed).dequantize())
    check_finite(tensor.name, w)
    return encoded(tensor.target, w, importance, effort)


def encoded(kind: str, w: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "normal") -> np.ndarray:
    """Bytes of floats in any type that there is an encoder for, or F32."""
    if kind == "F32":
        return np.ascontiguousarray(w, np.float32).view(np.uint8)
    return encode(kind, w, importance, effort)


def convert(
    source: Source,
    target: str | Path,
    *,
    quantize: str | None = None,
    output: Output = AS_ONE_FILE,
    progress: Progress = lambda name: None,
) -> list[Path]:
    """Write a source as it is, or with every float matrix in a plain type; see `rewrite`.

    Raises:
      QjaxError: see `kept_types`, `plan_plain` and `rewrite`.
    """
    if quantize is None:
        tensors = planned(source, kept_types(source, source.tensors))
    else:
        tensors = plan_plain(source, quantize)
    metadata = source.metadata
    if quantize is not None or source.found:
        metadata = with_file_type(source.metadata, {t.name: (t.target, t.shape) for t in tensors})
    types = source.metadata_types
    return rewrite(source, target, tensors, metadata=metadata, metadata_types=types, output=output, progress=progress)


def convert_to_mix(
    source: Source,
    target: str | Path,
    wish: Wish,
    *,
    imatrix: str | Path | None = None,
    requantize: bool = False,
    effort: Effort = "normal",
    output: Output = AS_ONE_FILE,
    progress: Progress = lambda name: None,
) -> tuple[list[Path], list[Planned]]:
    """Write a source quantized as llama-quantize would; see `rewrite`. Returns the files and what is in them.

    Raises:
      QjaxError: see `plan_mix`, `check_encoders`, `read_imatrix` and `rewrite`; an importance of another length than
        its weight's rows.
    """
    found = None if imatrix is None else read_imatrix(imatrix)
    tensors = plan_mix(source, wish._replace(imatrix=found is not None), requantize=requantize)
    check_encoders(source, tensors)
    metadata = {**source.metadata, "general.file_type": file_type(wish.mix), "general.quantization_version": 2}
    types = {**source.metadata_types, "general.file_type": "u32", "general.quantization_version": "u32"}
    columns = {}
    if found is not None:
        made_anew = {t.name: t.shape for t in tensors if t.target != t.source and t.target not in FLOAT_TYPES}
        columns = found.matched(source.path, made_anew)
        metadata |= {
            "quantize.imatrix.file": str(imatrix),
            "quantize.imatrix.entries_count": len(found.sums),
            "quantize.imatrix.chunks_count": found.chunks,
        }
        if found.datasets:
            metadata["quantize.imatrix.dataset"] = found.datasets[0]
    files = rewrite(
        source,
        target,
        tensors,
        metadata=metadata,
        metadata_types=types,
        importances=columns,
        effort=effort,
        output=output,
        progress=progress,
    )
    return files, tensors


def with_file_type(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Metadata whose `general.file_type` says what most weights (name -> type, shape) are, where there is a number."""
    weights: dict[str, int] = {}
    for kind, shape in tensors.values():
        weights[kind] = weights.get(kind, 0) + math.prod(shape)
    most = max(weights, key=lambda kind: weights[kind], default="").lower()
    changed = dict(metadata)
    if most in PLAIN_TYPES:
        changed["general.file_type"] = PLAIN_TYPES[most]
        if most.startswith("q"):
            changed["general.quantization_version"] = 2
    return changed
