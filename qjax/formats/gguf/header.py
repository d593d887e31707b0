"""The header of one GGUF file: magic, version, metadata, and where each tensor lies.

Source: ggml/docs/gguf.md and the checks of ggml/src/gguf.cpp. Versions 2 and 3, little-endian.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

from qjax.errors import UnsupportedError
from qjax.formats.gguf.cursor import DAMAGED, Cursor, shown
from qjax.formats.gguf.metadata import Metadata, read_metadata
from qjax.formats.gguf.types import GGML_TYPES, type_of_id

MAGIC = b"GGUF"
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
# Files use 32, rarely a memory page; without a limit, a copy of a hostile file could be gigabytes of padding.
MAX_ALIGNMENT = 1 << 20

# How other files that people mistake for GGUF begin.
_STRANGERS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or .npz)"),
    (b"\x80\x02", "a pickle (a PyTorch checkpoint)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "an HTML or XML page, not the file itself: download it again"),
    (b"{", "a JSON file"),
)
# The formats before GGUF, as a little-endian u32 magic puts them on disk.
_ANCIENTS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in numpy order: the last axis is in_features, stored row by row."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int  # from the start of the file `path`
    nbytes: int
    path: Path

    @property
    def row_bytes(self) -> int:
        """Bytes along the last axis."""
        return GGML_TYPES[self.type].row_bytes(self.shape[-1] if self.shape else 1)


@dataclass(frozen=True)
class Header:
    """What stands before the tensor data of one file. `tensors` are in file order."""

    version: int
    metadata: Metadata
    metadata_types: dict[str, str]
    alignment: int
    data_start: int
    tensors: dict[str, TensorInfo]


def read_header(data: mmap.mmap | bytes, path: Path) -> Header:
    """Parse and check the header of a whole file mapped at `data`.

    Raises:
        FormatError: no GGUF file, or one that is truncated, damaged or hostile.
        UnsupportedError: an old version, big-endian, or a type that qjax does not know.
    """
    cursor = Cursor(data, path)
    version = _read_version(cursor)
    tensor_count = cursor.u64("the number of tensors")
    key_count = cursor.u64("the number of metadata keys")
    metadata, types = read_metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata, types)
    # A tensor takes 8 bytes of name length, 4 of dimension count, 4 of type, 8 of offset.
    if tensor_count > cursor.left // 24:
        cursor.fail(f"the header claims {tensor_count} tensors, but only {cursor.left} bytes follow: {DAMAGED}")
    infos: dict[str, TensorInfo] = {}
    for index in range(tensor_count):
        info = _read_tensor_info(cursor, index, alignment)
        if info.name in infos:
            cursor.fail(f"tensor {shown(info.name)} stands twice in the header: {DAMAGED}")
        infos[info.name] = info
    start = align_up(cursor.position, alignment)
    tensors = {t.name: TensorInfo(t.name, t.shape, t.type, start + t.offset, t.nbytes, path) for t in infos.values()}
    _check_layout(cursor, tensors)
    return Header(version, metadata, types, alignment, start, tensors)


def align_up(position: int, alignment: int) -> int:
    """The next multiple of `alignment`, a power of two."""
    return position + -position % alignment


def is_alignment(value: object) -> bool:
    """Whether `general.alignment` may have this value."""
    return isinstance(value, int) and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0


def _read_version(cursor: Cursor) -> int:
    """Check the magic and return the version, or say what the file is instead."""
    path, start = cursor.path, cursor.data[:512]
    if start[:4] != MAGIC:
        if start[:4] in _ANCIENTS:
            raise UnsupportedError(
                f"{path}: this is a {_ANCIENTS[start[:4]]} file, older than GGUF: convert the model "
                "again with a current llama.cpp"
            )
        if start[:4] == MAGIC[::-1]:
            raise UnsupportedError(f"{path}: a GGUF file in reversed byte order; qjax reads little-endian files only")
        cursor.fail(f"expected a GGUF file (magic {MAGIC!r}), found {_describe_stranger(start, cursor.size)}")
    cursor.skip(4, "the magic")
    version = cursor.u32("the version")
    if version == 1:
        raise UnsupportedError(f"{path}: GGUF version 1, expected 2 or 3: convert the model again with llama.cpp")
    if version not in (2, 3):
        # A small number in the other byte order has its low half empty.
        if version != 0 and version & 0xFFFF == 0:
            raise UnsupportedError(f"{path}: a big-endian GGUF file; qjax reads little-endian files only")
        raise UnsupportedError(f"{path}: GGUF version {version}, expected 2 or 3: damaged, or newer than this qjax")
    return version


def _describe_stranger(start: bytes, size: int) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, what in _STRANGERS:
        if text.startswith(magic):
            return what
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
        return "a safetensors file"
    return repr(start[:4])


def _alignment(cursor: Cursor, metadata: Metadata, types: dict[str, str]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if types.get("general.alignment", "u32") != "u32" or not is_alignment(alignment):
        cursor.fail(
            f"general.alignment is {shown(str(alignment))} ({types['general.alignment']}), expected a power of "
            f"two (u32) up to {MAX_ALIGNMENT}: {DAMAGED}"
        )
    return alignment


def _read_tensor_info(cursor: Cursor, index: int, alignment: int) -> TensorInfo:
    """One entry of the tensor list; its offset is still relative to the data section."""
    name = cursor.name(f"the name of tensor {index}")
    what = f"tensor {shown(name)}"
    n_dims = cursor.u32(what)
    if n_dims > MAX_DIMS:
        cursor.fail(f"{what} has {n_dims} dimensions, expected at most {MAX_DIMS}: {DAMAGED}")
    # The file stores the fastest axis first, numpy last.
    shape = tuple(cursor.u64(what) for _ in range(n_dims))[::-1]
    elements = 1
    for length in shape:
        elements *= length
    if elements == 0:
        cursor.fail(f"{what} has an empty dimension, shape {shape}: {DAMAGED}")
    if elements >= 1 << 63:
        cursor.fail(f"{what} has shape {shape}, whose size overflows 64 bits: {DAMAGED}")
    kind = type_of_id(cursor.u32(what), f"{cursor.path}: {what}")
    row = shape[-1] if shape else 1
    if row % kind.block_size:
        cursor.fail(
            f"{what} has rows of {row} weights, expected a multiple of {kind.block_size}, the block size of "
            f"{kind.name}: {DAMAGED}"
        )
    offset = cursor.u64(what)
    if offset % alignment:
        cursor.fail(f"{what} lies at offset {offset}, expected a multiple of the alignment {alignment}: {DAMAGED}")
    return TensorInfo(name, shape, kind.name, offset, elements // row * kind.row_bytes(row), cursor.path)


def _check_layout(cursor: Cursor, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor lies inside the file, and no two share a byte."""
    previous = None
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            cursor.fail(
                f"the data of tensor {shown(tensor.name)} ({tensor.nbytes} bytes at {tensor.offset}) reaches "
                f"{end - cursor.size} bytes past the end of the file: truncated, download or make it again"
            )
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            cursor.fail(
                f"tensors {shown(previous.name)} ({previous.type}, {previous.nbytes} bytes at "
                f"{previous.offset}) and {shown(tensor.name)} (at {tensor.offset}) overlap: {DAMAGED}"
            )
        previous = tensor
