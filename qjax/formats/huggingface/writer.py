"""A folder of safetensors, config.json, tokenizer and card, made beside its place and renamed into it when it is whole.

One weight at a time is packed as the format has it; see `targets.py`.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.arrays import QuantizedArray
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.affine_parts import plain_numpy, plain_shapes
from qjax.formats.atomic import refusals, sync_folder, temporary_stem
from qjax.formats.huggingface import native
from qjax.formats.huggingface.checkpoint import INDEX, SINGLE
from qjax.formats.huggingface.safetensors_file import TensorSpec, data_of, header
from qjax.formats.huggingface.targets import Target, holding
from qjax.formats.huggingface.weights import rotary_halves
from qjax.formats.pieces import FileToWrite, Piece, write_files

SHARD_BYTES = 5_000_000_000
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Weight(NamedTuple):
    """A weight by its name in the checkpoint ("model.norm.weight").

    array: packed or float, as qjax has it. heads: of its rows, if rotary pairs are neighbours in them (GGUF's order),
    which checkpoints have as halves; None if rows are as they are.
    """

    name: str
    array: Any
    heads: int | None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    def rows_as_stored(self) -> Any:
        """The array, plain, with the checkpoint's order of rows; numpy leaves."""
        array = plain_numpy(self.array)
        if self.heads is None:
            return array
        order = rotary_halves(array.shape[0], self.heads)
        return array.map_rows(lambda leaf: leaf[order]) if isinstance(array, QuantizedArray) else array[order]


class Stored(NamedTuple):
    """What becomes of a weight: its tensors, and what makes them when their turn comes."""

    weight: Weight
    specs: Sequence[TensorSpec]
    tensors: Callable[[], Mapping[str, np.ndarray]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    def data(self) -> bytes:
        made = self.tensors()
        for spec in self.specs:
            if (made[spec.name].dtype, made[spec.name].shape) != (spec.dtype, spec.shape):
                raise AssertionError(f"{spec.name} was to be {spec}, became {made[spec.name].shape}")
        return b"".join(data_of(made[spec.name]) for spec in self.specs)


def write_folder(
    path: str | Path,
    target: Target,
    weights: Sequence[Weight],
    dtype: str,
    files: Callable[[dict[str, Any]], Mapping[str, bytes]],
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write a model, whole or not at all.

    Args:
      path: the folder to make; there may be an empty one.
      dtype: of what stays float, "float16", "bfloat16" or "float32", where that loses nothing.
      files: given `quantization_config`, the contents of all other files by their names.
      shard_bytes: of weights in one file; at least one weight each.
      overwrite: replace what is there.
      progress: told each weight's name once its bytes are made.

    Raises:
      UnsupportedError: the format does not hold a weight, which is named, with the formats that do.
      QjaxError: the folder is there, or the disk refuses.
    """
    place = _checked(path, overwrite)
    stored = [_stored(weight, target, dtype) for weight in weights]
    matrices = [s.weight for s in stored if s.weight.name.endswith(".weight") and s.weight.array.ndim > 1]
    packed = {w.module: w.array for w in matrices if isinstance(w.array, QuantizedArray) and target.packs(w.module)}
    if not packed:
        raise QjaxError(f"no weight is quantized: there is nothing to save as {target.name}")
    config = target.config(packed, [w.module for w in matrices if w.module not in packed])
    small = files(config)
    making = place.with_name(f"{temporary_stem(place)}partial")
    with refusals(path, making):
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        try:
            index = _write_shards(making, stored, shard_bytes, progress)
            if index is not None:
                small = {**small, INDEX: index}
            for name, data in small.items():
                with (making / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _install(making, place)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    sync_folder(place.parent)
    return Path(path)


def _checked(path: str | Path, overwrite: bool) -> Path:
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise QjaxError(f"{path}: cannot be written, there is no folder {place.parent}: make it first")
    if place.exists() and not place.is_dir():
        raise QjaxError(f"{path}: cannot be written, it is a file: name a folder")
    if place.is_dir() and any(place.iterdir()) and not overwrite:
        raise QjaxError(f"{path}: there is a folder with files already: name another one, or remove it")
    return place


def _install(making: Path, place: Path) -> None:
    """Rename the folder into its place, out of which what is there goes first."""
    old = making.with_name(f"{making.name}.old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    making.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _stored(weight: Weight, target: Target, dtype: str) -> Stored:
    """How a weight is stored.

    Raises:
      UnsupportedError: the format does not hold it.
    """
    name, array = weight.name, weight.array
    if not isinstance(array, QuantizedArray):
        return _as_floats(weight, array.dtype if array.ndim > 1 else DTYPES[dtype])
    if not target.packs(weight.module):
        warnings.warn(
            f"{name} is {plain_shapes(array).describe()}, for which {target.name} has no place: it becomes {dtype}",
            QjaxWarning,
            stacklevel=3,
        )
        return _as_floats(weight, DTYPES[dtype])

    def tensors() -> Mapping[str, np.ndarray]:
        try:
            return target.tensors(weight.module, weight.rows_as_stored())
        except UnsupportedError as error:
            raise _refused(weight, error) from error

    try:
        return Stored(weight, target.specs(weight.module, array), tensors)
    except UnsupportedError as error:
        raise _refused(weight, error) from error


def _refused(weight: Weight, error: UnsupportedError) -> UnsupportedError:
    others = holding(weight.module, weight.rows_as_stored())
    return UnsupportedError(f"{weight.name}: {error}; it can be saved as {', '.join(others)}")


def _as_floats(weight: Weight, kind: Any) -> Stored:
    """As floats of a dtype; float32 where a vector would lose by it."""
    array = weight.array
    if not isinstance(array, QuantizedArray) and array.dtype != kind:
        values = np.asarray(array).astype(np.float32)
        if not np.array_equal(values.astype(kind).astype(np.float32), values):
            kind = np.float32
    spec = TensorSpec(weight.name, np.dtype(kind), tuple(array.shape))

    def tensors() -> Mapping[str, np.ndarray]:
        rows = weight.rows_as_stored()
        if isinstance(rows, QuantizedArray):
            rows = np.asarray(jax.tree.map(jnp.asarray, rows).dequantize(jnp.float32))
        return {weight.name: rows.astype(kind)}

    return Stored(weight, [spec], tensors)


def _write_shards(
    folder: Path, stored: Sequence[Stored], shard_bytes: int, progress: Callable[[str], None]
) -> bytes | None:
    """Write the safetensors files; the index's contents if there are several."""
    shards: list[list[Stored]] = [[]]
    for entry in stored:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = [
        FileToWrite(folder / name, _head(shard), [_piece(entry, progress) for entry in shard])
        for name, shard in zip(names, shards, strict=True)
    ]
    write_files(folder / SINGLE, files)
    if count == 1:
        return None
    places = {spec.name: name for name, shard in zip(names, shards, strict=True) for s in shard for spec in s.specs}
    total = sum(entry.nbytes for entry in stored)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode()


def _head(shard: Sequence[Stored]) -> bytes:
    """What a file begins with; arrays that are stored leaf by leaf are described in it."""
    specs = [spec for entry in shard for spec in entry.specs]
    described = {
        entry.weight.name: native.describe(entry.weight.name, plain_shapes(entry.weight.array)).description
        for entry in shard
        if all(spec.name.startswith(f"{entry.weight.name}/") for spec in entry.specs)
    }
    return header(specs, native.metadata(described, {}) if described else {"format": "pt"})


def _piece(entry: Stored, progress: Callable[[str], None]) -> Piece:
    def make() -> bytes:
        data = entry.data()
        progress(entry.weight.name)
        return data

    return Piece(entry.nbytes, make)
