"""Importance matrices: for each weight the mean square of what each of its columns is multiplied with.

Source: llama.cpp's tools/imatrix (the GGUF form, `general.type` "imatrix") and its older binary form (.dat).
"""

import math
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from qjax.errors import FormatError, QjaxWarning
from qjax.formats.gguf.container import GGUFFile, open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1 << 12


class Importances(NamedTuple):
    """What a file says.

    of: float32 [in_features] by the weight's name, or [experts, in_features]; in one row in files of the older form.
    chunks: of text that were looked at; datasets: their names.
    """

    of: dict[str, Float32[np.ndarray, "*matrices n"]]
    chunks: int
    datasets: tuple[str, ...]

    def matched(
        self, path: Path, weights: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Float32[np.ndarray, "*experts n"]]:
        """The importance of each of the weights (name to shape) of a file that are quantized; a warning names the rest.

        Of a matrix [out, n] it is [n], of experts' [experts, out, n] it is [experts, n].

        Raises:
          FormatError: an importance of another length than its weight's rows, or of another number of experts.
        """
        found, missing = {}, []
        for name, shape in weights.items():
            values = self.of.get(name)
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
    for name, values in found.of.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise FormatError(f"{path}: the importance of {name} has numbers that are negative or not finite")
    if not found.of:
        raise FormatError(f"{path}: there is no importance in it; expected tensors NAME{_SUMS} and NAME{_COUNTS}")
    return found


def _from_gguf(file: GGUFFile) -> Importances:
    if file.metadata.get("general.type") != "imatrix":
        raise FormatError(f"{file.path}: is no importance matrix (its general.type is not 'imatrix')")
    of, idle = {}, {}
    for name in file.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        sums, counts = _floats(file, name), _floats(file, weight + _COUNTS)
        counts = counts.reshape(*sums.shape[:-1], 1) if counts.size == sums[..., 0].size else counts
        if counts.shape != (*sums.shape[:-1], 1):
            raise FormatError(f"{file.path}: {weight}{_COUNTS} has {counts.size} numbers, expected one a matrix")
        seen = counts > 0
        if seen.any():
            # Of an expert that no token was sent to, every column counts alike, as llama-quantize has it.
            means = np.where(seen, sums / np.where(seen, counts, np.float32(1)), np.float32(1))
            of[weight] = np.ascontiguousarray(np.squeeze(means))
            idle[weight] = int((~seen).sum())
    if any(idle.values()):
        name = max(idle, key=lambda name: idle[name])
        warnings.warn(
            f"{file.path}: no token was sent to {sum(idle.values())} matrices of experts, e.g. {idle[name]} of {name}: "
            "all columns of these count alike",
            QjaxWarning,
            stacklevel=4,
        )
    datasets = file.metadata.get("imatrix.datasets", [])
    chunks: Any = file.metadata.get("imatrix.chunk_count", 0)
    return Importances(of, chunks if isinstance(chunks, int) else 0, tuple(map(str, datasets)))


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    info = file.info(name)
    if info.type != "F32" or info.nbytes == 0:
        raise FormatError(f"{file.path}: tensor {name}: expected some F32, got {info.type} of shape {info.shape}")
    return file.raw(name).view(np.float32)


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

    entries, of = number("count"), {}
    for _ in range(max(entries, 0)):
        name = some(number("length of a name"), _LONGEST_NAME, "a name").decode("utf-8", "replace")
        calls = number("number of calls")
        values = np.frombuffer(some(4 * number("length"), len(data), f"the importance of {name}"), "<f4")
        if calls > 0:
            of[name] = values / np.float32(calls)
    chunks = number("number of chunks") if at < len(data) else 0
    datasets = (some(number("length"), len(data), "a dataset").decode("utf-8", "replace"),) if at < len(data) else ()
    return Importances(of, chunks, datasets)
