"""What a model is read from, whatever lies on the disk: a GGUF file, or a Hugging Face folder seen as one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from qjax.formats.gguf.container import open_gguf
from qjax.formats.huggingface.parts import Found
from qjax.formats.huggingface.source import open_folder


@runtime_checkable
class SourceTensor(Protocol):
    """A tensor as a GGUF file has it: `shape` in numpy order, `type` ggml's name, `nbytes` in that type.

    Of a matrix that is packed as no ggml type is (those in `Source.found`), `type` says what it is for people.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Source(Protocol):
    """An open model under GGUF's names, as `GGUFFile` and `HuggingFaceFolder` are.

    Attributes:
        path: the file (of a split model the first shard) or the folder.
        metadata, metadata_types: GGUF's keys to Python values, and to the names of their types.
        tensors: by name, in the order in which they are written.
    """

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]:
        """What the model is read from."""
        ...

    @property
    def format(self) -> str:
        """What lies there, for people: "GGUF v3"."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def metadata_types(self) -> Mapping[str, str]: ...
    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...
    @property
    def found(self) -> Mapping[str, Found]:
        """How each matrix that is packed as no ggml type is was found."""
        ...

    def raw(self, name: str) -> UInt8[np.ndarray, "*rows row_bytes"]:
        """The tensor's bytes in its `type`, not of one in `found`: a view of the file if they lie so, else a copy."""
        ...

    def array(self, name: str) -> Any:
        """The tensor as a packed or float array with numpy leaves, which may be views of the file."""
        ...

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; what `raw` gave stays valid."""
        ...


def open_source(path: str | Path) -> Source:
    """Open the GGUF file, or the folder of a Hugging Face model, that `locate` found.

    Raises:
        FormatError, UnsupportedError: see `open_gguf` and `open_folder`.
    """
    return open_folder(path) if Path(path).is_dir() else open_gguf(path)
