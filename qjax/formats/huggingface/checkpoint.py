"""Weights in safetensors files, one or several, by memory map: names, shapes and places, all checked.

A file is a u64 length, that many bytes of JSON (name -> dtype, shape, data_offsets into the rest), and the data.
Several files have an index, `model.safetensors.index.json`, that says which tensor lies in which.
Source: the format's description in huggingface/safetensors' README.
"""

import math
import mmap
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Shaped, UInt8

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface.json_files import parse_object, read_object
from qjax.formats.huggingface.safetensors_file import NUMPY
from qjax.formats.mapped import drop_pages, map_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Bytes of a number of each dtype.
DTYPES = {name: dtype.itemsize for name, dtype in NUMPY.items()}
# The format's own limit.
_LONGEST_HEADER = 100_000_000
_SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_WHAT = "a .safetensors file"
_KEYS = ("dtype", "shape", "data_offsets")


class StoredTensor(NamedTuple):
    """Where a tensor lies: `offset` counts from the start of the file `path`; `dtype` is one of `DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class Checkpoint:
    """All tensors of a model, by their names in it; `tensors` are in the order of files and of their headers."""

    def __init__(self, tensors: dict[str, StoredTensor], maps: dict[Path, mmap.mmap]) -> None:
        self.tensors = tensors
        self._maps = maps

    def raw(self, name: str) -> UInt8[np.ndarray, " nbytes"]:
        """A tensor's bytes, row by row: a read-only view of the file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._maps[tensor.path], np.uint8, tensor.nbytes, tensor.offset)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory."""
        tensor = self.tensors[name]
        drop_pages(self._maps[tensor.path], tensor.offset, tensor.nbytes)


def as_numpy(tensor: StoredTensor, raw: UInt8[np.ndarray, " nbytes"]) -> Shaped[np.ndarray, "..."]:
    """A tensor's numbers, a view of its bytes; 8-bit floats as their bits."""
    dtype = np.dtype(np.uint8) if tensor.dtype.startswith("F8") else NUMPY[tensor.dtype]
    # Files may put a tensor at any byte.
    aligned = raw if raw.__array_interface__["data"][0] % dtype.itemsize == 0 else raw.copy()
    return aligned.view(dtype).reshape(tensor.shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Map the safetensors files of a folder and read their headers; no weight is read.

    Raises:
        FormatError: a file is missing, truncated or damaged; an index that names what is not there.
        UnsupportedError: weights in another format only.
    """
    index = _read_index(folder)
    names = list(dict.fromkeys(index.values())) if index is not None else _files_without_index(folder)
    tensors: dict[str, StoredTensor] = {}
    maps: dict[Path, mmap.mmap] = {}
    for path in (folder / name for name in sorted(names)):
        if not path.exists():
            raise FormatError(f"{path}: this shard of the model is missing: download it")
        maps[path] = map_file(path, _WHAT)
        for name, tensor in read_header(maps[path], path).items():
            # What the index does not name, or names elsewhere, is not the model's.
            if index is not None and index.get(name) != path.name:
                continue
            if name in tensors:
                raise FormatError(f"{path}: tensor {shown(name)} stands in {tensors[name].path.name} already")
            tensors[name] = tensor
    for name, file in (index or {}).items():
        if name not in tensors:
            raise FormatError(f"{folder / file}: tensor {shown(name)} is missing, {INDEX} says that it is there")
    return Checkpoint(tensors, maps)


def _read_index(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in; None for a folder without index."""
    path = folder / INDEX
    if not path.exists():
        return None
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{path}: expected a 'weight_map' of tensor names to files: download it again")
    for file in found.values():
        # Names only: a path would leave the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise FormatError(f"{path}: expected names of .safetensors files beside it, got {shown(str(file))}")
    return found


def _files_without_index(folder: Path) -> list[str]:
    if (folder / SINGLE).exists():
        return [SINGLE]
    found = sorted(entry.name for entry in folder.iterdir() if _SHARD.fullmatch(entry.name))
    all_there = [entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors"]
    if not found and len(all_there) == 1:
        # AutoGPTQ named files after bits and groups.
        return all_there
    if not found:
        others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".h5"))
        there = f"; {others[0]} is of a format that qjax does not read (it may run code)" if others else ""
        raise UnsupportedError(f"{folder}: no {SINGLE} there{there}: save the model as safetensors")
    count = found[0][len("model-00001-of-") :].removesuffix(".safetensors")
    return [f"model-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]


def read_header(data: mmap.mmap | bytes, path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of one file lies, in the header's order.

    Raises:
        FormatError: the file is truncated or damaged: no length, no JSON, or tensors outside the data or in each other.
    """

    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, _LONGEST_HEADER):
        stranger = "a Git LFS pointer, not the file itself" if data[:8] == b"version " else "truncated, or not one"
        raise _damaged(path, f"expected {_WHAT}; this is {stranger}")
    start = 8 + length
    header = parse_object(data[8:start], f"{path}: its header")
    header.pop("__metadata__", None)
    tensors = {name: _entry(name, entry, path, start) for name, entry in header.items()}
    previous = None
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        what = f"tensor {shown(tensor.name)} ({tensor.nbytes} bytes at {tensor.offset})"
        if tensor.offset + tensor.nbytes > len(data):
            raise _damaged(path, f"{what} reaches past the end of the file, which is truncated")
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise _damaged(path, f"{what} overlaps {shown(previous.name)}")
        previous = tensor
    return tensors


def _entry(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    what = f"tensor {shown(name)}"
    dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None for key in _KEYS)
    if not isinstance(dtype, str) or not _are_natural(shape) or not _are_natural(offsets):
        raise _damaged(path, f"{what} is described by {shown(str(entry))}, expected {', '.join(_KEYS)}")
    if dtype not in DTYPES:
        raise UnsupportedError(f"{path}: {what} has the dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * DTYPES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _damaged(path, f"{what}, {dtype} of shape {tuple(shape)}, lies at {offsets}, expected {nbytes} bytes")
    return StoredTensor(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _are_natural(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _damaged(path: Path, problem: str) -> FormatError:
    return FormatError(f"{path}: {problem}: download or make it again")
