"""Open a GGUF file, or all shards of a split one, by memory map.

Metadata come as Python values, tensors as views of the map: nothing of a tensor is read before what
`GGUFFile.raw` gives is used. Source: ggml/docs/gguf.md.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from qjax.errors import FormatError
from qjax.formats.gguf.arrays import from_blocks
from qjax.formats.gguf.cursor import shown
from qjax.formats.gguf.header import Header, TensorInfo, read_header
from qjax.formats.gguf.split import join_shards, shard_paths
from qjax.formats.mapped import drop_pages, map_file

__all__ = ["GGUFFile", "TensorInfo", "open_gguf"]

_WHAT = "a .gguf file"


class GGUFFile:
    """An open GGUF model.

    Attributes:
        path: the file (of a split model: the first shard).
        shards: all files of the model; `(path,)` for a model in one file.
        version: 2 or 3.
        metadata: int, float, bool and str; arrays as read-only numpy arrays or list[str], decoded when used.
            Bytes of a token that are no UTF-8 are kept as lone surrogates ("surrogateescape").
        metadata_types: the type each value has in the file: "u32", "f32", "str", "arr[i32]", ...
        tensors: name to TensorInfo, in file order.

    The memory maps live as long as the object or any view that `raw` gave. Replacing the file on disk by a
    rename leaves them as they are.
    """

    def __init__(self, paths: list[Path], maps: list[mmap.mmap], headers: list[Header]) -> None:
        self.path: Path = paths[0]
        self.shards: tuple[Path, ...] = tuple(paths)
        self.version: int = headers[0].version
        self.metadata: Mapping[str, Any] = headers[0].metadata
        self.metadata_types: Mapping[str, str] = headers[0].metadata_types
        self.tensors: dict[str, TensorInfo] = (
            join_shards(paths, headers) if len(paths) > 1 else dict(headers[0].tensors)
        )
        self._maps = dict(zip(paths, maps, strict=True))

    @property
    def files(self) -> tuple[Path, ...]:
        """What the model is read from, as every `Source` says it."""
        return self.shards

    @property
    def found(self) -> Mapping[str, Any]:
        """Nothing: all types are ggml's, as their names say."""
        return {}

    @property
    def format(self) -> str:
        """What it is, for people."""
        return f"GGUF v{self.version}"

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies.

        Raises:
            FormatError: the file has no tensor of this name.
        """
        if name not in self.tensors:
            raise FormatError(
                f"{self.path}: there is no tensor {shown(name)} among the {len(self.tensors)} of the file"
            )
        return self.tensors[name]

    def raw(self, name: str) -> UInt8[np.ndarray, "*rows row_bytes"]:
        """The tensor's bytes as they lie in the file: a read-only view, not a copy.

        Returns:
            uint8 [*shape[:-1], row_bytes]; [row_bytes] for a tensor of one dimension or none.

        Raises:
            FormatError: the file has no tensor of this name.
        """
        info = self.info(name)
        flat = np.frombuffer(self._maps[info.path], np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.row_bytes)

    def array(self, name: str) -> Any:
        """The tensor as a packed or float array, with numpy leaves that may be views of the file.

        Raises:
            FormatError: the file has no tensor of this name.
            UnsupportedError: a type without a decoder.
        """
        return from_blocks(self.info(name).type, self.raw(name), np.asarray)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from this process's memory; views stay valid and read them again.

        Raises:
            FormatError: the file has no tensor of this name.
        """
        info = self.info(name)
        drop_pages(self._maps[info.path], info.offset, info.nbytes)

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {len(self.shards)} file(s))"


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file by memory map; any shard of a split model opens the whole model.

    Args:
        path: a `.gguf` file, or any `NAME-00001-of-00003.gguf`.

    Returns:
        The open file, its header parsed and every tensor's place checked.

    Raises:
        FormatError: missing, a directory, not GGUF, truncated, damaged, hostile, or a shard is missing.
        UnsupportedError: GGUF version 1, big-endian, or a type that qjax does not know.
    """
    path = Path(path)
    first = map_file(path, _WHAT)
    header = read_header(first, path)
    paths = shard_paths(path, header)
    maps = [first if p == path else map_file(p, _WHAT) for p in paths]
    headers = [header if p == path else read_header(m, p) for p, m in zip(paths, maps, strict=True)]
    return GGUFFile(paths, maps, headers)
