"""Importance matrices: for each weight the mean square of what each of its columns is multiplied with.

Source: llama.cpp's tools/imatrix (the GGUF form, `general.type` "imatrix") and its older binary form (.dat).
"""

import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from qjax.errors import FormatError, QjaxWarning
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.gguf.container import GGUFFile, open_gguf
from qjax.formats.gguf.writer import TensorToWrite, write_gguf

_SUMS, _COUNTS, _ROWS = ".in_sum2", ".counts", ".out_sum2"
_LONGEST_NAME = 1 << 12


class Importances(NamedTuple):
    """What a file says, by the weight's name.

    sums: of the squares in each column, [in_features], or [experts, in_features]; in one row in files of
      the older form. float32, or
      float64 of a calibration that is under way.
    counts: how many rows were summed, [] or [matrices]; of a .dat file chunks.
    chunks: of text that were looked at, of chunk_size tokens each (0 if the file does not say); datasets: their names.
    row_sums: how much each row matters, [out_features], summed over as many tokens; only where that was looked at (see
      `qjax.calibrate.fisher`). A tensor NAME.out_sum2 of its own, which llama.cpp passes over.
    """

    sums: dict[str, Float[np.ndarray, "*matrices n"]]
    counts: dict[str, Float[np.ndarray, "*matrices"]]
    chunks: int
    chunk_size: int
    datasets: tuple[str, ...]
    row_sums: Mapping[str, Float[np.ndarray, " out"]] = MappingProxyType({})

    @property
    def of(self) -> dict[str, Float32[np.ndarray, "*matrices n"]]:
        """The mean squares; of an expert that no token was sent to ones, as llama-quantize has it."""
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][..., None]
            means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        return means

    def matched(
        self, path: Path, weights: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Float32[np.ndarray, "*experts n"]]:
        """The importance of each of the weights (name to shape) of a file that are quantized; a warning names the rest.

        Of a matrix [out, n] it is [n], of experts' [experts, out, n] it is [experts, n].

        Raises:
          FormatError: an importance of another length than its weight's rows, or of another number of experts.
        """
        found, missing, means = {}, [], self.of
        for name, shape in weights.items():
            values = means.get(name)
            columns = (*shape[:-2], shape[-1])
            if values is not None and values.size != math.prod(columns):
                raise FormatError(
                    f"{path}: {name} of shape {shape} has {math.prod(columns)} columns, its importance is of shape "
                    f"{values.shape}; the matrix is of another model"
                )
            if values is not None:
                found[name] = values.reshape(columns)
            elif name != "token_embd.weight":
                # Of an embedding only rows are looked up: nothing is multiplied with it, unless it is the output too.
                missing.append(name)
        for name in missing:
            warnings.warn(
                f"{name}: quantized without importance, the matrix has none for it", QjaxWarning, stacklevel=3
            )
        return found


def read_imatrix(path: str | Path) -> Importances:
    """The importances of a file that llama-imatrix or qjax made; entries that nothing was counted for are left out.

    Raises:
      FormatError: neither form, cut short, or numbers that are no importances.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    found = _from_gguf(open_gguf(path)) if magic == b"GGUF" else _from_dat(path)
    for name, sums in (*found.sums.items(), *found.counts.items(), *found.row_sums.items()):
        if not np.isfinite(sums).all() or (sums < 0).any():
            raise FormatError(f"{path}: the importance of {name} has numbers that are negative or not finite")
    if not found.sums:
        raise FormatError(f"{path}: there is no importance in it; expected tensors NAME{_SUMS} and NAME{_COUNTS}")
    return found


def write_imatrix(
    path: str | Path, importances: Importances, *, exact: bool = False, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write llama-imatrix's GGUF form, atomically: of the same numbers the same bytes.

    Args:
      exact: float64 sums as F64, which qjax reads and llama.cpp does not; else all sums are rounded to F32.
      metadata: more keys, after llama.cpp's.

    Raises:
      QjaxError: see `write_gguf`.
    """
    tensors = []
    for name in sorted(importances.sums):
        of = {
            _SUMS: importances.sums[name],
            _COUNTS: importances.counts[name][..., None].astype(np.float32),
            _ROWS: importances.row_sums.get(name),
        }
        for suffix, values in of.items():
            if values is None:
                continue
            kept = values if exact and values.dtype == np.float64 else values.astype(np.float32)
            kind = "F64" if kept.dtype == np.float64 else "F32"
            tensors.append(TensorToWrite(name + suffix, kept.shape, kind, np.ascontiguousarray(kept).view(np.uint8)))
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": list(importances.datasets),
        "imatrix.chunk_count": importances.chunks,
        "imatrix.chunk_size": importances.chunk_size,
    }
    write_gguf(path, {**keys, **(metadata or {})}, tensors)


def merge(parts: Sequence[Importances], *, chunk_size: int) -> Importances:
    """The importances of all their texts together: sums and counts are added.

    Args:
      chunk_size: tokens of a chunk, of files that do not say it (.dat) and of the result.

    Raises:
      FormatError: two have a weight of this name with other columns, or some have row_sums and others none.
    """
    if any(part.row_sums for part in parts) and not all(part.row_sums for part in parts):
        raise FormatError("importances of gradients and of inputs are not of one kind: merge those of one")
    rows: dict[str, np.ndarray] = {}
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for part in parts:
        # What a file counts in chunks is counted in tokens here.
        each = 1 if part.chunk_size else chunk_size
        for name, values in part.sums.items():
            more, count = values.astype(np.float64) * each, part.counts[name].astype(np.float64) * each
            if name in sums and sums[name].shape != more.shape:
                raise FormatError(
                    f"{name}: importances of shapes {sums[name].shape} and {more.shape} are of two models: merge those "
                    "of one"
                )
            sums[name] = sums[name] + more if name in sums else more
            counts[name] = counts[name] + count if name in counts else count
        for name, values in part.row_sums.items():
            if name in rows and rows[name].shape != values.shape:
                raise FormatError(f"{name}: rows of {rows[name].shape} and {values.shape} are of two models")
            rows[name] = rows.get(name, 0.0) + values.astype(np.float64)
    most = max((int(count.max()) for count in counts.values()), default=0)
    datasets = tuple(dataset for part in parts for dataset in part.datasets)
    return Importances(sums, counts, most // chunk_size, chunk_size, datasets, rows)


def _from_gguf(file: GGUFFile) -> Importances:
    if file.metadata.get("general.type") != "imatrix":
        raise FormatError(f"{file.path}: is no importance matrix (its general.type is not 'imatrix')")
    sums, counts, rows, idle = {}, {}, {}, {}
    for name in file.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        found, count = _floats(file, name, "F32", "F64"), _floats(file, weight + _COUNTS, "F32")
        found = found[0] if found.ndim == 2 and len(found) == 1 else found
        if count.size != found[..., 0].size:
            raise FormatError(f"{file.path}: {weight}{_COUNTS} has {count.size} numbers, expected one a matrix")
        if (count > 0).any():
            sums[weight], counts[weight] = found, count.reshape(found.shape[:-1])
            idle[weight] = int((count == 0).sum())
            if weight + _ROWS in file.tensors:
                rows[weight] = _floats(file, weight + _ROWS, "F32", "F64")
    if any(idle.values()):
        name = max(idle, key=lambda name: idle[name])
        warnings.warn(
            f"{file.path}: no token was sent to {sum(idle.values())} matrices of experts, e.g. {idle[name]} of {name}: "
            "all columns of these count alike",
            QjaxWarning,
            stacklevel=4,
        )
    datasets: Any = file.metadata.get("imatrix.datasets", [])
    datasets = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    chunks, size = (file.metadata.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size"))
    chunks, size = (number if isinstance(number, int) else 0 for number in (chunks, size))
    return Importances(sums, counts, chunks, size, datasets, rows)


def _floats(file: GGUFFile, name: str, *kinds: str) -> np.ndarray:
    info = file.info(name)
    if info.type not in kinds or info.nbytes == 0:
        expected = " or ".join(kinds)
        raise FormatError(
            f"{file.path}: tensor {name}: expected some {expected}, got {info.type} of shape {info.shape}"
        )
    return np.array(file.raw(name)).view(FLOAT_TYPES[info.type])


def _from_dat(path: Path) -> Importances:
    """count, then (length, name, calls, length, sums of means a call) each; then chunks and one name of a dataset."""
    data = path.read_bytes()
    at = 0

    def number(what: str) -> int:
        nonlocal at
        if at + 4 > len(data):
            raise FormatError(f"{path}: is no importance matrix, or cut short: no {what} at byte {at}")
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return value

    def some(count: int, most: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= count <= most or at + count > len(data):
            raise FormatError(f"{path}: is no importance matrix, or cut short: {what} of {count} bytes at byte {at}")
        at += count
        return data[at - count : at]

    entries, sums, counts = number("count"), {}, {}
    for _ in range(max(entries, 0)):
        name = some(number("length of a name"), _LONGEST_NAME, "a name").decode("utf-8", "replace")
        calls = number("number of calls")
        values = np.frombuffer(some(4 * number("length"), len(data), f"the importance of {name}"), "<f4")
        if calls > 0:
            sums[name], counts[name] = values, np.array(calls, np.float32)
    chunks = number("number of chunks") if at < len(data) else 0
    datasets = (some(number("length"), len(data), "a dataset").decode("utf-8", "replace"),) if at < len(data) else ()
    return Importances(sums, counts, chunks, 0, datasets)
