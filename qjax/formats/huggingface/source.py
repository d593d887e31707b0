"""A Hugging Face folder, seen as the GGUF file that llama.cpp's converter would make of it.

Names, metadata, types of norms and the order of rows are GGUF's; nothing is written, and weights are read when `raw` or
`array` asks for them. Matrices that are quantized in a way that no ggml type is are found in `found`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.gguf.arrays import from_blocks
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface import native
from qjax.formats.huggingface.checkpoint import Checkpoint, StoredTensor, as_numpy, open_checkpoint
from qjax.formats.huggingface.config import Config, read_config
from qjax.formats.huggingface.labels import read_labels
from qjax.formats.huggingface.metadata import read_metadata, rope_factors
from qjax.formats.huggingface.parts import OUTPUT_SCALES, Found, Packed, Parts, by_module
from qjax.formats.huggingface.quantized import find_packed, is_packed
from qjax.formats.huggingface.weights import (
    DERIVED,
    Place,
    heads_of,
    heads_of_rows,
    matrix_shapes,
    places,
    rotary_neighbours,
)

ROPE_FACTORS = "rope_freqs.weight"
_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class FolderTensor:
    """A tensor under its GGUF name: `type` is what it is seen as.

    stored: where it lies, None if it is computed or `packed`. packed: the module that it is, or is rows of.
    rotary_heads: the number of heads in whose rows rotary pairs are made neighbours, None for other weights.
    rows: those of a tensor that holds several, None for all.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    stored: StoredTensor | None = None
    rotary_heads: int | None = None
    rows: slice | None = None
    packed: Packed | None = None

    @property
    def nbytes(self) -> int:
        """In its type; of a packed matrix in the file."""
        if self.packed is not None:
            return self.packed.nbytes * self.shape[0] // self.packed.shape[0]
        return math.prod(self.shape) * np.dtype(_FLOATS[self.type]).itemsize

    @property
    def order(self) -> Any:
        """Index of the rows of what is stored, None for all as they are."""
        if self.rotary_heads is None:
            return self.rows
        order = rotary_neighbours(self.shape[0], self.rotary_heads)
        return order if self.rows is None else order + self.rows.start


class HuggingFaceFolder:
    """An open folder; a `Source`, as `GGUFFile` is one.

    Attributes:
        path: the folder.
        metadata, metadata_types: as `GGUFFile` has them.
        tensors: by GGUF's names, in the order of the checkpoint.
        found: how each packed matrix was found, by GGUF's name.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        tensors: dict[str, FolderTensor],
        metadata: Mapping[str, Any],
        metadata_types: Mapping[str, str],
        factors: np.ndarray | None,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.metadata_types = metadata_types
        self.tensors = tensors
        self.found: Mapping[str, Found] = MappingProxyType(
            {name: tensor.packed.found for name, tensor in tensors.items() if tensor.packed is not None}
        )
        self._checkpoint = checkpoint
        self._factors = factors

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the folder."""
        return tuple(sorted(entry for entry in self.path.iterdir() if entry.is_file()))

    @property
    def format(self) -> str:
        """What it is, for people."""
        kinds = sorted({found.kind for found in self.found.values()})
        return f"Hugging Face safetensors{', ' if kinds else ''}{', '.join(kinds)}"

    def raw(self, name: str) -> UInt8[np.ndarray, "*rows row_bytes"]:
        """A tensor's bytes in its `type`: a read-only view where they lie so on the disk, else a copy.

        Raises:
            FormatError: there is no tensor of this name.
            UnsupportedError: it is packed in a way that no ggml type is.
        """
        tensor = self._tensor(name)
        if tensor.packed is not None:
            raise UnsupportedError(f"{self.path}: tensor {shown(name)} is {tensor.type}, which no GGUF type is")
        if tensor.stored is None:
            assert self._factors is not None
            return self._factors.view(np.uint8)
        data = self._checkpoint.raw(tensor.stored.name)
        if tensor.type != tensor.stored.dtype:
            data = data.view(_FLOATS[tensor.stored.dtype]).astype(np.float32).view(np.uint8)
        if len(tensor.shape) == 1 and tensor.order is not None:
            return data.reshape(tensor.stored.shape[0], -1)[tensor.order].reshape(-1)
        rows = data.reshape(*tensor.stored.shape[:-1], -1)
        return rows if tensor.order is None else rows[tensor.order]

    def array(self, name: str) -> Any:
        """A tensor as a packed or float array, with numpy leaves.

        Raises:
            FormatError: there is no tensor of this name, or it is damaged.
        """
        tensor = self._tensor(name)
        if tensor.packed is None:
            return from_blocks(tensor.type, self.raw(name), np.asarray)
        parts = tensor.packed.parts
        array = tensor.packed.read({suffix: as_numpy(s, self._checkpoint.raw(s.name)) for suffix, s in parts.items()})
        order = tensor.order
        return array if order is None else array.map_rows(lambda leaf: leaf[order])

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory.

        Raises:
            FormatError: there is no tensor of this name.
        """
        tensor = self._tensor(name)
        for stored in (tensor.stored, *(tensor.packed.parts.values() if tensor.packed else ())):
            if stored is not None:
                self._checkpoint.release(stored.name)

    def _tensor(self, name: str) -> FolderTensor:
        if name not in self.tensors:
            raise FormatError(f"{self.path}: there is no tensor {shown(name)} among the {len(self.tensors)} there")
        return self.tensors[name]

    def __repr__(self) -> str:
        return f"HuggingFaceFolder({str(self.path)!r}, {len(self.tensors)} tensors)"


def open_folder(path: str | Path) -> HuggingFaceFolder:
    """Open a folder with config.json, safetensors and tokenizer files; no weight is read.

    Raises:
        FormatError: a file is missing, truncated or damaged, or they do not fit each other.
        UnsupportedError: an architecture, a variant of one, a dtype, a tokenizer or a kind of quantization that is not
            known.
    """
    path = Path(path)
    config = read_config(path / "config.json")
    checkpoint = open_checkpoint(path)
    factors = rope_factors(config)
    tensors: dict[str, FolderTensor] = {}
    if factors is not None:
        tensors[ROPE_FACTORS] = FolderTensor(ROPE_FACTORS, factors.shape, "F32")
    tensors |= _seen(checkpoint, config, path)
    most = next((t.type for t in tensors.values() if len(t.shape) > 1 and t.packed is None), "F16")
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    metadata, types = read_metadata(path, config, parameters, most)
    return HuggingFaceFolder(path, checkpoint, tensors, metadata, types, factors)


def _seen(checkpoint: Checkpoint, config: Config, path: Path) -> dict[str, FolderTensor]:
    """The checkpoint's tensors under GGUF's names, in its order."""
    shapes, heads = matrix_shapes(config), heads_of(config)
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not DERIVED.fullmatch(name)}
    described = native.descriptions(dict.fromkeys(tensor.path for tensor in checkpoint.tensors.values()))
    own = native.leaf_names(described.values())
    apart = {name: tensor for name, tensor in stored.items() if name not in own}
    modules = {name: held for name, held in by_module(apart).items() if not OUTPUT_SCALES.issuperset(held)}
    ours = {name.removesuffix(".weight"): native.find(checkpoint, name, described[name], path) for name in described}
    for module, found in ours.items():
        modules.setdefault(module, {})["weight"] = next(iter(found.parts.values()))
    where: dict[str, tuple[Place, ...]] = {}
    quantized: dict[str, Parts] = {}
    for module, held in modules.items():
        where[module] = places(module, shapes)
        if not where[module] or "" in held:
            first = next(iter(held.values()))
            what = f"{first.path}: tensor {shown(first.name)}"
            raise UnsupportedError(f"{what} is not part of a {config.arch} model as qjax knows it")
        whole = [shapes.get(place.part) for place in where[module]]
        shape = (sum(shape[0] for shape in whole if shape is not None), whole[0][1] if whole[0] else 0)
        parts = Parts(module, held, checkpoint.raw, shape)
        if module in ours and ours[module].shape != shape:
            raise FormatError(f"{parts.where()} has the shape {ours[module].shape}, expected {shape} by config.json")
        if module in ours:
            continue
        if whole[0] is not None and is_packed(parts):
            quantized[module] = parts
        elif whole[0] is None and not {"weight", "bias"}.issuperset(held):
            raise UnsupportedError(f"{parts.where()} has {', '.join(held)}; only matrices can be quantized")
    packed = find_packed(quantized, read_labels(path, config.values)) | ours
    tensors = {}
    for module, held in modules.items():
        for suffix in held:
            for place in where[module]:
                if suffix != "bias" and module in packed:
                    name = f"{place.name}.weight"
                    tensors[name] = _matrix(packed[module], name, place, heads_of_rows(config.arch, name, heads))
                elif suffix in ("weight", "bias"):
                    name = f"{place.name}.{suffix}"
                    tensors[name] = _floats(held[suffix], name, place, heads_of_rows(config.arch, name, heads))
    return tensors


def _matrix(packed: Packed, name: str, place: Place, rotary: int | None) -> FolderTensor:
    """A packed matrix, or its rows that are the place's."""
    rows = packed.shape[0] if place.rows is None else place.rows.stop - place.rows.start
    first = next(iter(packed.parts.values()))
    _check_heads(f"{first.path}: tensor {shown(first.name)}", rows, rotary)
    return FolderTensor(name, (rows, packed.shape[1]), packed.found.label, None, rotary, place.rows, packed)


def _check_heads(what: str, rows: int, rotary: int | None) -> None:
    if rotary is not None and rows % (2 * rotary):
        raise FormatError(f"{what} has {rows} rows, expected a multiple of 2 for each of {rotary} heads")


def _floats(stored: StoredTensor, name: str, place: Place, rotary: int | None) -> FolderTensor:
    """A tensor of floats, or its rows that are the place's."""
    what = f"{stored.path}: tensor {shown(stored.name)}"
    if stored.dtype not in _FLOATS:
        raise UnsupportedError(f"{what} has the dtype {stored.dtype}; known are {', '.join(_FLOATS)}")
    if 0 in stored.shape or not 1 <= len(stored.shape) <= 2:
        raise FormatError(f"{what} has the shape {stored.shape}, expected a vector or a matrix")
    if place.rows is not None and stored.shape[0] < place.rows.stop:
        raise FormatError(f"{what} has {stored.shape[0]} rows, expected {place.rows.stop} at least by config.json")
    rows = stored.shape[0] if place.rows is None else place.rows.stop - place.rows.start
    _check_heads(what, rows, rotary)
    kind = stored.dtype if len(stored.shape) == 2 else "F32"
    return FolderTensor(name, (rows, *stored.shape[1:]), kind, stored, rotary, place.rows)
