"""Round to nearest: the grid of each group by its smallest and largest weight, each weight to its nearest point.

Source of the grids: compressed-tensors' `calculate_qparams` (symmetric: the largest magnitude is (2**bits - 1) / 2
steps; asymmetric: zero is a point of the grid). Source of the search for a narrower one: IST-DASLab/gptq's quant.py
(`mse`), which looks further down and sums |error|^2.4; here errors are squared, and can be weighted.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from qjax.arrays.affine import AffineArray, widen
from qjax.arrays.floats import divide
from qjax.arrays.scheme import Scheme, affine


class Grid(NamedTuple):
    """scale [..., out, groups] as it is stored (float16), and uint8 zero points of that shape, None for the middle."""

    scale: Any
    zero: Any


# How much wider or narrower grids are tried than the one that holds all of a group's weights.
_WIDEST, _STEP, _STEPS = 1.1, 0.025, 31


def grid_of(
    w: Float32[Array, "*lead out in"],
    scheme: Scheme,
    *,
    mse: bool = False,
    importance: Float32[Array, "*lead in"] | None = None,
) -> Grid:
    """The grid that holds all of each group's weights, or with `mse` the one of the least squared error.

    Args:
      importance: what squared errors of each column are weighted with, for `mse`; None for ones.
    """
    lead, (out, columns) = w.shape[:-2], w.shape[-2:]
    groups = scheme.groups(columns)
    grouped = w.reshape(*lead, out, groups, columns // groups)
    axes = (-3, -2, -1) if scheme.group_size == 0 else (-1,)
    least = jnp.minimum(grouped.min(axes, keepdims=True), 0)
    most = jnp.maximum(grouped.max(axes, keepdims=True), 0)
    grid = grid_between(least, most, scheme)
    if mse:
        if importance is not None:
            importance = importance.reshape(*lead, 1, groups, -1)
        grid = _of_least_error(grouped, grid, least, most, scheme, axes, importance)
    shape = (*lead, out, groups)
    return Grid(*(None if leaf is None else jnp.broadcast_to(leaf[..., 0], shape) for leaf in grid))


def _of_least_error(
    grouped: Any, grid: Grid, least: Any, most: Any, scheme: Scheme, axes: tuple[int, ...], importance: Any
) -> Grid:
    """Of `grid` and those between multiples of `least` and `most`."""

    def error(grid: Grid) -> Any:
        scale, zero = widened(grid, scheme)
        square = jnp.square(scale * (nearest(grouped, scale, zero, scheme) - zero) - grouped)
        return jnp.sum(square if importance is None else square * importance, axes, keepdims=True)

    def step(i: Any, best: Any) -> Any:
        share = jnp.float32(_WIDEST) - jnp.float32(_STEP) * i.astype(jnp.float32)
        tried = grid_between(share * least, share * most, scheme)
        new = (error(tried), tried)
        better = new[0] < best[0]
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), new, best)

    return lax.fori_loop(0, _STEPS, step, (error(grid), grid))[1]


def grid_between(least: Float32[Array, "*s"], most: Float32[Array, "*s"], scheme: Scheme) -> Grid:
    """The grid of groups whose weights lie between `least` <= 0 and `most` >= 0."""
    if scheme.symmetric:
        scale = stored(jnp.maximum(-least, most) / jnp.float32(scheme.max_code / 2))
        return Grid(scale, None)
    scale = stored((most - least) / jnp.float32(scheme.max_code))
    zero = jnp.clip(jnp.round(-least / scale.astype(jnp.float32)), 0, scheme.max_code)
    return Grid(scale, zero.astype(jnp.uint8))


def stored(scale: Float32[Array, "*s"]) -> Float[Array, "*s"]:
    """A scale as files hold it: float16, never 0."""
    half = jnp.clip(scale, 0, 65504).astype(jnp.float16)
    return jnp.where(half == 0, jnp.float16(1), half)


def widened(grid: Grid, scheme: Scheme) -> tuple[Float32[Array, "*s"], Float32[Array, "..."]]:
    """A grid's scales and zero points as float32."""
    zero = jnp.float32(scheme.middle) if grid.zero is None else grid.zero.astype(jnp.float32)
    return widen(grid.scale), zero


def nearest(
    w: Float32[Array, "..."], scale: Float32[Array, "..."], zero: Float32[Array, "..."], scheme: Scheme
) -> Float32[Array, "..."]:
    """The nearest codes, as floats; halves go to even numbers of steps from zero."""
    return jnp.clip(jnp.round(divide(w, scale)) + zero, 0, scheme.max_code)


def _by_column(grid: Grid, columns: int, scheme: Scheme) -> tuple[Any, Any]:
    """float32 scale and zero point of each weight, [..., out, in or 1]."""
    repeats = columns // grid.scale.shape[-1]
    spread = lambda leaf: leaf if leaf.ndim == 0 else jnp.repeat(leaf, repeats, axis=-1)
    scale, zero = widened(grid, scheme)
    return spread(scale), spread(zero)


def to_codes(w: Float32[Array, "*lead out in"], grid: Grid, scheme: Scheme) -> UInt8[Array, "*lead out in"]:
    """The nearest codes."""
    return nearest(w, *_by_column(grid, w.shape[-1], scheme), scheme).astype(jnp.uint8)


def from_codes(codes: UInt8[Array, "*lead out in"], grid: Grid, scheme: Scheme) -> Float32[Array, "*lead out in"]:
    """What codes stand for."""
    scale, zero = _by_column(grid, codes.shape[-1], scheme)
    return scale * (codes.astype(jnp.float32) - zero)


@partial(jax.jit, static_argnames=("scheme", "mse"))
def rtn(w: Float[Array, "*lead out in"], scheme: Scheme, *, mse: bool = False) -> AffineArray:
    """The weights rounded to nearest; any leading axes (layers, experts) are mapped over.

    Args:
      mse: search each group's grid for the least squared error.

    Raises:
      QjaxError: rows that are no whole groups.
    """
    w = w.astype(jnp.float32)
    grid = grid_of(w, scheme, mse=mse)
    return affine(to_codes(w, grid, scheme), grid.scale, grid.zero, scheme.bits)
