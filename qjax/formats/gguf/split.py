"""Models split over several GGUF files: `NAME-00001-of-00003.gguf` and so on.

Source: llama.cpp's `llama_split_path` and tools/gguf-split, whose way to fill shards this is. Each shard is a GGUF
file with its own tensors and the keys `split.no` (from 0), `split.count` and `split.tensors.count`; the first one
also holds all other metadata.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from qjax.errors import FormatError, QjaxWarning
from qjax.formats.gguf.cursor import shown
from qjax.formats.gguf.header import Header, TensorInfo

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

# In the order in which gguf-split writes them.
SPLIT_KEYS = {"split.no": "u16", "split.tensors.count": "i32", "split.count": "u16"}

_MAX_SHARDS = 2**16 - 1


def fill_shards(path: Path, names: Sequence[str], sizes: Sequence[int], limit: int | None) -> list[slice]:
    """Which tensors each shard gets: in order, as many as fit; the header does not count.

    A tensor larger than the limit has a shard for itself, with a QjaxWarning.

    Args:
        path: of the model, for messages.
        names, sizes: of the tensors; bytes with their padding.
        limit: bytes of tensors in a shard; None for all in one.

    Returns:
        Slices of the tensors, at least one.

    Raises:
        FormatError: more shards than `split.count` can say.
    """
    starts, filled = [0], 0
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if limit is not None and size > limit:
            warnings.warn(
                f"{path}: tensor {shown(name)} has {size} bytes, more than the {limit} of a shard: its shard is larger",
                QjaxWarning,
                stacklevel=4,
            )
        if limit is not None and filled and filled + size > limit:
            starts.append(index)
            filled = 0
        filled += size
    if len(starts) > _MAX_SHARDS:
        raise FormatError(f"{path}: {len(starts)} shards of {limit} bytes, expected up to {_MAX_SHARDS}: allow more")
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(names)], strict=True)]


def shard_path(path: Path, number: int, count: int) -> Path:
    """Name of a shard, `number` from 0, of the model that would be `path` as one file."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number + 1:05d}-of-{count:05d}.gguf")


def split_metadata(number: int, count: int, tensor_count: int) -> dict[str, int]:
    """The values of SPLIT_KEYS in the shard `number` (from 0) of `count`."""
    return dict(zip(SPLIT_KEYS, (number, tensor_count, count), strict=True))


def shard_paths(path: Path, header: Header) -> list[Path]:
    """All files of the model that `path` belongs to, in order; only `path` for a model in one file.

    Args:
        path: the file that was asked for, any of the shards.
        header: its header.

    Raises:
        FormatError: the name and `split.count` disagree, or a shard is missing.
    """
    named = _NAME.fullmatch(path.name)
    name_count = int(named["count"]) if named else 1
    # 0 is what gguf-split leaves in a file that it merged.
    header_count = max(_integer(path, header, "split.count", 0), 1)
    if header_count == 1 and name_count <= 1:
        return [path]
    if named is None:
        raise FormatError(
            f"{path}: one of {header_count} shards, but its name does not end like "
            f"-00001-of-{header_count:05d}.gguf: rename the shards so that the others can be found"
        )
    if header_count != name_count:
        raise FormatError(
            f"{path}: the name says {name_count} shards, split.count in the file says {header_count}: "
            "the shards are of different models, or misnamed"
        )
    # The stem as it is: gguf-split lets it end in .gguf too.
    paths = [path.with_name(f"{named['stem']}-{n:05d}-of-{name_count:05d}.gguf") for n in range(1, name_count + 1)]
    present = {entry.name for entry in path.parent.iterdir()}
    missing = [p.name for p in paths if p.name not in present]
    if path in paths and not missing:
        return paths
    if path not in paths:
        raise FormatError(f"{path}: the name says shard {named['number']} of {name_count}: the file is misnamed")
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise FormatError(
        f"{path}: shard {path.with_name(missing[0])}{more} is missing, expected {name_count} files in all"
    )


def join_shards(paths: Sequence[Path], headers: Sequence[Header]) -> dict[str, TensorInfo]:
    """The tensors of all shards, in order, after a check that the shards belong together.

    Raises:
        FormatError: `split.no` or `split.count` of a shard is not what its name says, a tensor stands in two
            shards, or there are fewer or more tensors than `split.tensors.count` says.
    """
    tensors: dict[str, TensorInfo] = {}
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        for key, expected in (("split.no", number), ("split.count", len(paths))):
            found = _integer(path, header, key, -1)
            if found != expected:
                raise FormatError(f"{path}: {key} is {found}, expected {expected} by the file's name: it is misnamed")
        for name, info in header.tensors.items():
            if name in tensors:
                raise FormatError(f"{path}: tensor {shown(name)} stands in {tensors[name].path.name} already")
            tensors[name] = info
    total = _integer(paths[0], headers[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FormatError(f"{paths[0]}: the {len(paths)} shards hold {len(tensors)} tensors, expected {total}")
    return tensors


def _integer(path: Path, header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if key in header.metadata and (not isinstance(value, int) or isinstance(value, bool)):
        raise FormatError(f"{path}: {key} is of type {header.metadata_types[key]}, expected an integer")
    return value
