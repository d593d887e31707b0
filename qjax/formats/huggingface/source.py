"""A Hugging Face folder, seen as the GGUF file that llama.cpp's converter would make of it.

Names, metadata, types of norms and the order of rows are GGUF's; nothing is written, and weights are read when `raw`
asks for them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from qjax.formats.huggingface.config import read_config
from qjax.formats.huggingface.metadata import read_metadata, rope_factors
from qjax.formats.huggingface.weights import DERIVED, Heads, gguf_name, heads_of_rows, rotary_neighbours

ROPE_FACTORS = "rope_freqs.weight"
_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class FolderTensor:
    """A tensor under its GGUF name: `type` is what it is seen as, `stored` where it lies (None: it is computed).

    rotary_heads: the number of heads in whose rows rotary pairs are made neighbours, None for other weights.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    stored: StoredTensor | None
    rotary_heads: int | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_FLOATS[self.type]).itemsize


class HuggingFaceFolder:
    """An open folder; a `Source`, as `GGUFFile` is one.

    Attributes:
        path: the folder.
        metadata, metadata_types: as `GGUFFile` has them.
        tensors: by GGUF's names, in the order of the checkpoint.
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
        self._checkpoint = checkpoint
        self._factors = factors

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the folder."""
        return tuple(sorted(entry for entry in self.path.iterdir() if entry.is_file()))

    @property
    def format(self) -> str:
        """What it is, for people."""
        return "Hugging Face safetensors"

    def raw(self, name: str) -> UInt8[np.ndarray, "*rows row_bytes"]:
        """A tensor's bytes in its `type`: a read-only view where they lie so on the disk, else a copy.

        Raises:
            FormatError: there is no tensor of this name.
        """
        tensor = self._tensor(name)
        if tensor.stored is None:
            assert self._factors is not None
            return self._factors.view(np.uint8)
        data = self._checkpoint.raw(tensor.stored.name)
        if tensor.type != tensor.stored.dtype:
            data = data.view(_FLOATS[tensor.stored.dtype]).astype(np.float32).view(np.uint8)
        rows = data.reshape(*tensor.shape[:-1], -1)
        if tensor.rotary_heads is None:
            return rows
        return rotary_neighbours(data.reshape(tensor.shape[0], -1), tensor.rotary_heads).reshape(rows.shape)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory.

        Raises:
            FormatError: there is no tensor of this name.
        """
        tensor = self._tensor(name)
        if tensor.stored is not None:
            self._checkpoint.release(tensor.stored.name)

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
        UnsupportedError: an architecture, a variant of one, a dtype or a tokenizer that is not known.
    """
    path = Path(path)
    config = read_config(path / "config.json")
    checkpoint = open_checkpoint(path)
    heads = Heads(
        config.count("num_attention_heads"),
        config.count("num_key_value_heads", config.count("num_attention_heads")),
    )
    factors = rope_factors(config)
    tensors: dict[str, FolderTensor] = {}
    if factors is not None:
        tensors[ROPE_FACTORS] = FolderTensor(ROPE_FACTORS, factors.shape, "F32", None, None)
    for stored in checkpoint.tensors.values():
        if not DERIVED.fullmatch(stored.name):
            tensor = _seen(stored, config.arch, heads)
            tensors[tensor.name] = tensor
    most = next((tensor.type for tensor in tensors.values() if len(tensor.shape) > 1), "F32")
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    metadata, types = read_metadata(path, config, parameters, most)
    return HuggingFaceFolder(path, checkpoint, tensors, metadata, types, factors)


def _seen(stored: StoredTensor, arch: str, heads: Heads) -> FolderTensor:
    what = f"{stored.path}: tensor {shown(stored.name)}"
    name = gguf_name(stored.name)
    if name is None:
        raise UnsupportedError(f"{what} is not part of a {arch} model as qjax knows it")
    if stored.dtype not in _FLOATS:
        raise UnsupportedError(f"{what} has the dtype {stored.dtype}; known are {', '.join(_FLOATS)}")
    if 0 in stored.shape or not 1 <= len(stored.shape) <= 2:
        raise FormatError(f"{what} has the shape {stored.shape}, expected a vector or a matrix")
    rotary = heads_of_rows(arch, name, heads)
    if rotary is not None and stored.shape[0] % (2 * rotary):
        raise FormatError(f"{what} has {stored.shape[0]} rows, expected a multiple of 2 for each of {rotary} heads")
    kind = stored.dtype if len(stored.shape) == 2 else "F32"
    return FolderTensor(name, stored.shape, kind, stored, rotary)
