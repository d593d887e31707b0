"""Types for the tensors of a model under a budget of bytes: what each type costs each tensor, and the best choice.

A type's cost is the KL divergence that its rounding error is expected to add (`fisher.divergence_of`): of the error
that the encoder really makes, in all rows of a small matrix, in rows drawn by how much they matter of a large one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.arrays import QuantizedArray, parse_scheme
from qjax.calibrate.fisher import Fisher, divergence_of, drawn_rows
from qjax.errors import QjaxError
from qjax.formats.gguf import from_blocks
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.gguf.header import DEFAULT_ALIGNMENT, align_up
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.source import Source
from qjax.models.load import read_array
from qjax.quantizers.allocation import Choice, allocate
from qjax.quantizers.ggml import Effort, encode
from qjax.quantizers.ggml_legacy import check_finite
from qjax.quantizers.rtn import rtn

# What is chosen from, unless told: for rows of whole super-blocks, and for others.
SUPER_BLOCKED = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
BLOCKED = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")

# Weights of a matrix that errors are measured on.
SAMPLE = 1 << 18


class Budgeted(NamedTuple):
    """The types chosen, by tensor; the KL divergence in nats a token that they are expected to cost."""

    types: dict[str, str]
    divergence: float


def stored(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor: of a ggml type in a GGUF file, with the padding behind it, or of a scheme ("w4g128")."""
    if type_name not in GGML_TYPES:
        return parse_scheme(type_name).nbytes(tuple(shape))
    kind = GGML_TYPES[type_name]
    nbytes = int(np.prod(shape, dtype=np.int64)) // kind.block_size * kind.block_bytes
    return align_up(nbytes, DEFAULT_ALIGNMENT)


def _some_rows(file: Source, name: str, rows: np.ndarray | None) -> Float32[np.ndarray, "rows in"]:
    array = read_array(file, name, apply_scale=False)
    if isinstance(array, QuantizedArray):
        at = np.arange(array.shape[0]) if rows is None else rows
        return np.asarray(array.take(jnp.asarray(at, jnp.int32), jnp.float32))
    return np.asarray(array if rows is None else array[rows], np.float32)


@jax.jit
def _floats(array: QuantizedArray) -> Float32[Array, "rows in"]:
    """One program for each type, not one for each operation."""
    return array.dequantize()


def _costs(
    w: np.ndarray, kinds: Sequence[str], fisher: Fisher, rows: Any, importance: Any, effort: Effort
) -> list[float]:
    costs = []
    for kind in kinds:
        if kind in FLOAT_TYPES:
            made = w.astype(FLOAT_TYPES[kind]).astype(np.float32)
        elif kind not in GGML_TYPES:
            made = _floats(rtn(jnp.asarray(w), parse_scheme(kind)))
        else:
            made = _floats(from_blocks(kind, encode(kind, w, importance, effort)))
        costs.append(divergence_of(fisher, jnp.asarray(made) - jnp.asarray(w), rows))
    return costs


def choices(
    file: Source,
    kinds: Mapping[str, Sequence[str]],
    fishers: Mapping[str, Fisher],
    importances: Mapping[str, Float32[np.ndarray, " n"]],
    *,
    effort: Effort = "normal",
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Choice]]:
    """What each of the types `kinds` costs each tensor.

    Args:
      kinds: types, or schemes (rounded to nearest: what a method makes of them is better), by the tensor's name.
      importances: what encoders weight columns by, where there is one.
      effort: of the encoders.

    Raises:
      QjaxError: a tensor without Fisher information; weights that are not finite.
    """
    found = {}
    for name, of in kinds.items():
        shape = file.tensors[name].shape
        fisher = fishers.get(name)
        if fisher is None or (fisher.rows.size, fisher.columns.size) != shape:
            raise QjaxError(f"{file.path}: nothing is known of how much {name} {shape} matters: calibrate this model")
        rows = drawn_rows(fisher, SAMPLE // shape[1]) if shape[0] * shape[1] > SAMPLE and fisher.rows.any() else None
        w = _some_rows(file, name, rows)
        check_finite(name, w)
        costs = _costs(w, of, fisher, rows, importances.get(name), effort)
        found[name] = [Choice(kind, stored(kind, shape), cost) for kind, cost in zip(of, costs, strict=True)]
        file.release(name)
        progress(name)
    return found


def fit(of: Mapping[str, Sequence[Choice]], nbytes: int) -> Budgeted:
    """The types that fit so many bytes and cost least.

    Raises:
      QjaxError: see `allocate`.
    """
    chosen = allocate(of, nbytes)
    return Budgeted(
        {name: choice.type for name, choice in chosen.items()}, sum(choice.loss for choice in chosen.values())
    )
