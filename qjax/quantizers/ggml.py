"""Float matrices to the blocks of any ggml type with an encoder, by the importance of each column if that is known.

Rows go a piece at a time through one compiled program, as many side by side as there are cores: what a search holds
stays in cache, and memory beside the result is that of a few pieces.
"""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from qjax.errors import QjaxError
from qjax.quantizers import ggml_legacy
from qjax.quantizers.ggml_blocks import FORMS, Steps
from qjax.quantizers.ggml_high import HIGH
from qjax.quantizers.ggml_iq4 import IQ4_TYPES
from qjax.quantizers.ggml_k import K_TYPES
from qjax.quantizers.ggml_weighted import WEIGHTED

# Types that are searched for with importance and without.
SEARCHED: Mapping[str, Steps] = MappingProxyType({**K_TYPES, **IQ4_TYPES})
# Every type that floats are encoded to.
TYPES = (*ggml_legacy.encoders, *SEARCHED)

# Weights of a piece: what a search holds of so many stays in a core's cache; extremes are found in one pass anyway.
_SEARCHED, _PLAIN = 1 << 15, 1 << 19

Effort = Literal["normal", "high"]
EFFORTS: tuple[str, ...] = get_args(Effort)
Importance = Float32[Array | np.ndarray, "*matrices n"]


def block_size(type: str) -> int:
    """Weights of a block of a type in TYPES."""
    return FORMS[type].size if type in SEARCHED else ggml_legacy.encoders[type].block_size


def _block_bytes(type: str) -> int:
    return FORMS[type].nbytes if type in SEARCHED else ggml_legacy.encoders[type].block_bytes


def _columns(rows: np.ndarray, size: int) -> np.ndarray:
    """[rows, n] as [size, blocks]: a block a column."""
    return np.ascontiguousarray(rows.reshape(-1, size).T)


# Steps as programs of their own: within one, XLA:CPU makes what a loop reads anew for every number that it is read for.
@functools.partial(jax.jit, static_argnums=0)
def _prepare(type: str, blocks: Any, importance: Any) -> Any:
    return SEARCHED[type].prepare(blocks, importance)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _search(type: str, groups: Any, weighted: bool) -> Any:
    return SEARCHED[type].search(groups, weighted)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _finish(type: str, groups: Any, found: Any, weighted: bool) -> Any:
    return SEARCHED[type].finish(groups, found, weighted)


@functools.partial(jax.jit, static_argnums=0)
def _pack(type: str, made: Any) -> Any:
    return FORMS[type].pack(made).T


@functools.partial(jax.jit, static_argnums=0)
def _quantize_weighted(type: str, w: Any, importance: Any) -> Any:
    return WEIGHTED[type](w, importance)


def _encode_searched(type: str, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    weighted = importance is not None
    columns = _columns(np.broadcast_to(importance, w.shape), FORMS[type].size) if weighted else None
    groups = _prepare(type, _columns(w, FORMS[type].size), columns)
    made = _finish(type, groups, _search(type, groups, weighted), weighted)
    return np.asarray(_pack(type, made)).reshape(len(w), -1)


def _encode_piece(type: str, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    if type in SEARCHED:
        return _encode_searched(type, w, importance)
    if importance is not None and type in WEIGHTED:
        return np.asarray(ggml_legacy.pack_rows(type, _quantize_weighted(type, jnp.asarray(w), importance)))
    return np.asarray(ggml_legacy.encode(type, w))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _high(type: str, step: str, *args: Any) -> Any:
    return getattr(HIGH[type], step)(*args)


@functools.partial(jax.jit, static_argnums=0)
def _start(type: str, groups: Any, made: Any) -> Any:
    return HIGH[type].start(FORMS[type], groups, made)


def _encode_high(type: str, w: np.ndarray, importance: np.ndarray | None, made: np.ndarray) -> np.ndarray:
    """Better blocks than those that were `made`."""
    form = FORMS[type]
    columns = None if importance is None else _columns(np.broadcast_to(importance, w.shape), form.size)
    groups = _high(type, "prepare", _columns(w, form.size), columns)
    solution = _start(type, groups, _columns(made, form.nbytes))
    solution = _high(type, "grid", groups, _high(type, "alone", groups), solution)
    solution = _high(type, "refine", groups, solution)
    return np.asarray(_pack(type, _high(type, "finish", groups, solution))).reshape(made.shape)


def encode(
    type: str,
    w: Float[Array | np.ndarray, "*rows n"],
    importance: Importance | None = None,
    effort: Effort = "normal",
) -> UInt8[np.ndarray, "*rows row_bytes"]:
    """The rows of `w` in blocks of `type`: uint8[*rows, n / block_size * block_bytes].

    Args:
      type: one of TYPES.
      w: finite weights (see `ggml_legacy.check_finite`); F16 and BF16 take any. Cast to float32 piece by piece.
      importance: of each column, not negative, the mean square of what it is multiplied with; [*matrices, n] for
        matrices [*matrices, out, n] (experts) that are multiplied with different things. Types that do not search do
        without.
      effort: "normal" makes what ggml makes; "high" searches on from there, for blocks of no larger and mostly a
        smaller sum of importance * (decoded - w)^2, the importance being 1 where there is none. For Q2_K and Q3_K the
        terms are times sqrt(2 * mean(w^2) + w^2), the mean over the block: measured, so a model's predictions end
        nearer to those of the floats, unlike with more bits. Types not in `HIGH` are the same by both.

    Raises:
      QjaxError: an unknown type or effort, rows that are no whole number of blocks, or an importance of another length
        or with negative or non-finite numbers.
    """
    if type not in TYPES:
        raise QjaxError(f"expected a type to encode to, one of {', '.join(TYPES)}; got {type!r}")
    if effort not in EFFORTS:
        raise QjaxError(f"expected an effort of {' or '.join(EFFORTS)}, got {effort!r}")
    size = block_size(type)
    if w.ndim == 0 or w.shape[-1] % size:
        raise QjaxError(f"expected rows of a multiple of {size} weights for {type}, got shape {w.shape}")
    n = w.shape[-1]
    if importance is not None and importance.ndim > 1:
        return _encode_each(type, w, importance, effort)
    weights = _checked(importance, n)
    rows = w.reshape(-1, n)
    out = np.empty((rows.shape[0], n // size * _block_bytes(type)), np.uint8)
    # Always as many: a program for other shapes may fuse other multiplications and additions, and so round otherwise.
    more = effort == "high" and type in HIGH
    searched = more or type in SEARCHED or (weights is not None and type in WEIGHTED)
    each = max(1, (_SEARCHED if searched else _PLAIN) // n)

    def piece(first: int) -> None:
        last = min(first + each, rows.shape[0])
        some = np.asarray(rows[first:last], np.float32)
        if len(some) < each:
            some = np.pad(some, ((0, each - len(some)), (0, 0)))
        made = _encode_piece(type, some, weights)
        if more:
            made = _encode_high(type, some, weights, made)
        out[first:last] = made[: last - first]

    _for_all(piece, range(0, rows.shape[0], each))
    return out.reshape(*w.shape[:-1], out.shape[-1])


def _encode_each(type: str, w: Any, importance: Importance, effort: Effort) -> np.ndarray:
    if importance.shape != (*w.shape[:-2], w.shape[-1]):
        raise QjaxError(f"expected an importance of each column of matrices {w.shape}, got shape {importance.shape}")
    matrices, columns = w.reshape(-1, *w.shape[-2:]), importance.reshape(-1, w.shape[-1])
    made = [encode(type, matrix, some, effort) for matrix, some in zip(matrices, columns, strict=True)]
    return np.concatenate(made).reshape(*w.shape[:-1], -1)


def _for_all(piece: Callable[[int], None], firsts: range) -> None:
    if len(firsts) < 2:
        for first in firsts:
            piece(first)
        return
    # The first alone: it compiles.
    piece(firsts[0])
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(firsts))) as pool:
        for _ in pool.map(piece, firsts[1:]):
            pass


def _checked(importance: Importance | None, n: int) -> np.ndarray | None:
    if importance is None:
        return None
    held = np.asarray(importance, np.float32)
    if held.shape != (n,):
        raise QjaxError(f"expected an importance of each of {n} columns, got shape {held.shape}")
    if not np.isfinite(held).all() or (held < 0).any():
        raise QjaxError("expected an importance of finite numbers that are not negative")
    return held
