"""Write a GGUF file, or shards of one: the header first, then the tensors, of which one at a time is in memory.

Source: ggml/docs/gguf.md; the layout is that of llama.cpp's `gguf_write_to_file`: version 3, little-endian,
every tensor (the last one too) padded with zeros to the alignment.
"""

import functools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import FormatError
from qjax.formats.gguf.cursor import shown
from qjax.formats.gguf.header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    align_up,
    is_alignment,
)
from qjax.formats.gguf.metadata import encode_name, encode_value
from qjax.formats.gguf.split import SPLIT_KEYS, fill_shards, shard_path, split_metadata
from qjax.formats.gguf.types import type_of_name
from qjax.formats.pieces import FileToWrite, Piece, Resume, write_files

VERSION = 3


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor for `write_gguf`.

    Attributes:
        name: as it will stand in the file.
        shape: in numpy order, last = in_features, a multiple of the type's block size.
        type: such as "Q4_K"; one of `GGML_TYPES`.
        data: the encoded bytes, uint8 of any shape, or a function that gives them when their turn comes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: np.ndarray | Callable[[], np.ndarray]


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorToWrite],
    *,
    metadata_types: Mapping[str, str] | None = None,
    split_max_bytes: int | None = None,
    resume: Resume | None = None,
) -> list[Path]:
    """Write one GGUF file or its shards, atomically: `path` changes only when every byte is on the disk.

    The file that is being read may be the one that is written: the rename leaves its memory map as it was.
    The split keys of a sharded source are left out, because the written file is whole.

    Args:
        path: the file to make or replace.
        metadata: keys to values as `GGUFFile.metadata` gives them, or plain Python values; written in this
            order. `general.alignment` (default 32) is honoured.
        tensors: written in this order. Their descriptions are needed at once, their data one by one.
        metadata_types: types of the values as in `GGUFFile.metadata_types`; keys without one get the
            type that fits the value (see `encode_value`).
        split_max_bytes: bytes of tensors in a shard, as gguf-split counts them. What is more than that becomes
            `NAME-00001-of-0000N.gguf` and so on beside `path`; None for one file of any size.
        resume: see `write_files`; its numbers are of tensors. Tensors that are done are not made again.

    Returns:
        The files, in order.

    Raises:
        FormatError: a value does not fit its type, a name is used twice, a shape does not fit its type, or
            the data of a tensor are not uint8 or not of the size that shape and type say.
        UnsupportedError: unknown tensor type.
        QjaxError: the disk or folder refuses, or another process writes the same file.
    """
    path, tensors = Path(path), tuple(tensors)
    types = dict(metadata_types or {})
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not is_alignment(alignment):
        raise FormatError(f"{path}: general.alignment is {alignment!r}, expected a power of two up to {MAX_ALIGNMENT}")
    types["general.alignment"] = "u32"
    sizes = [align_up(_check_tensor(path, tensor), alignment) for tensor in tensors]
    _check_names(path, tensors)
    shards = fill_shards(path, [tensor.name for tensor in tensors], sizes, split_max_bytes)
    if len(shards) > 1 or metadata.get("split.count", 0) not in (0, 1):
        metadata = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    files = []
    for number, shard in enumerate(shards):
        values, name = dict(metadata), path
        if len(shards) > 1:
            if number > 0:
                values = {key: value for key, value in values.items() if key == "general.alignment"}
            values |= split_metadata(number, len(shards), len(tensors))
            types |= SPLIT_KEYS
            name = shard_path(path, number, len(shards))
        pieces = [
            Piece(size, functools.partial(_tensor_bytes, path, tensor))
            for tensor, size in zip(tensors[shard], sizes[shard], strict=True)
        ]
        files.append(FileToWrite(name, _header(values, types, tensors[shard], sizes[shard], alignment), pieces))
    write_files(path, files, resume)
    return [file.path for file in files]


def header_nbytes(
    metadata: Mapping[str, Any], tensors: Sequence[TensorToWrite], *, metadata_types: Mapping[str, str] | None = None
) -> int:
    """Bytes before the data of the first tensor in a file that `write_gguf` would make, not split."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return len(_header(metadata, metadata_types or {}, tensors, [0] * len(tensors), alignment))


def _header(
    metadata: Mapping[str, Any],
    types: Mapping[str, str],
    tensors: Sequence[TensorToWrite],
    sizes: Sequence[int],
    alignment: int,
) -> bytes:
    """All bytes before the data of the first tensor; `sizes` with padding."""
    entries = [encode_value(key, value, types.get(key)) for key, value in metadata.items()]
    parts = [MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries)), *entries]
    offset = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        parts.append(_tensor_entry(tensor, offset))
        offset += size
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _check_tensor(path: Path, tensor: TensorToWrite) -> int:
    """Bytes of the tensor's data; FormatError unless a reader would accept its shape."""
    what = f"{path}: tensor {shown(tensor.name)}"
    kind = type_of_name(tensor.type, what)
    row = tensor.shape[-1] if tensor.shape else 1
    if len(tensor.shape) > MAX_DIMS or any(length < 1 for length in tensor.shape):
        raise FormatError(f"{what} has shape {tensor.shape}, expected up to {MAX_DIMS} dimensions, none of them empty")
    if row % kind.block_size:
        raise FormatError(
            f"{what} has rows of {row} weights, expected a multiple of {kind.block_size}, the block size of {kind.name}"
        )
    rows = 1
    for length in tensor.shape[:-1]:
        rows *= length
    return rows * kind.row_bytes(row)


def _check_names(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """FormatError if two tensors have one name."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise FormatError(f"{path}: two tensors to write have the name {shown(tensor.name)}")
        seen.add(tensor.name)


def _tensor_entry(tensor: TensorToWrite, offset: int) -> bytes:
    """The tensor's line in the header; `offset` counts from the start of the data."""
    dims = tensor.shape[::-1]
    type_id = type_of_name(tensor.type, tensor.name).id
    return encode_name(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def _tensor_bytes(path: Path, tensor: TensorToWrite) -> memoryview:
    """The tensor's data, made now if a function gives them; FormatError if their size is not as declared."""
    data = tensor.data if isinstance(tensor.data, np.ndarray) else tensor.data()
    size = _check_tensor(path, tensor)
    if data.dtype != np.uint8 or data.nbytes != size:
        raise FormatError(
            f"{path}: the data of tensor {shown(tensor.name)} are {data.dtype} of {data.nbytes} bytes, "
            f"expected uint8 of {size} bytes for {tensor.type} of shape {tensor.shape}"
        )
    return np.ascontiguousarray(data).reshape(-1).data
