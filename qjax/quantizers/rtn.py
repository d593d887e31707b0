"""Round to nearest: the grid of each group by its smallest and largest weight, each weight to its nearest point.

Source of the grids: compressed-tensors' `calculate_qparams` (symmetric: the largest magnitude is (2**bits - 1) / 2
steps; asymmetric: zero is a point of the grid).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from qjax.arrays.affine import AffineArray
from qjax.arrays.scheme import Scheme, affine


class Grid(NamedTuple):
    """scale [..., out, groups] as it is stored (float16), and uint8 zero points of that shape, None for the middle."""

    scale: Any
    zero: Any


def grid_of(w: Float32[Array, "*lead out in"], scheme: Scheme) -> Grid:
    """The grid that holds all of each group's weights."""
    lead, (out, columns) = w.shape[:-2], w.shape[-2:]
    groups = scheme.groups(columns)
    grouped = w.reshape(*lead, out, groups, columns // groups)
    axes = (-3, -2, -1) if scheme.group_size == 0 else (-1,)
    least = jnp.minimum(grouped.min(axes, keepdims=True), 0)
    most = jnp.maximum(grouped.max(axes, keepdims=True), 0)
    grid = grid_between(least, most, scheme)
    shape = (*lead, out, groups)
    return Grid(*(None if leaf is None else jnp.broadcast_to(leaf[..., 0], shape) for leaf in grid))


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


def _by_column(grid: Grid, columns: int, scheme: Scheme) -> tuple[Any, Any]:
    """float32 scale and zero point of each weight, [..., out, in or 1]."""
    repeats = columns // grid.scale.shape[-1]
    spread = lambda leaf: jnp.repeat(leaf.astype(jnp.float32), repeats, axis=-1)
    zero = jnp.float32(scheme.middle) if grid.zero is None else spread(grid.zero)
    return spread(grid.scale), zero


def to_codes(w: Float32[Array, "*lead out in"], grid: Grid, scheme: Scheme) -> UInt8[Array, "*lead out in"]:
    """The nearest codes."""
    scale, zero = _by_column(grid, w.shape[-1], scheme)
    return jnp.clip(jnp.round(w / scale) + zero, 0, scheme.max_code).astype(jnp.uint8)


def from_codes(codes: UInt8[Array, "*lead out in"], grid: Grid, scheme: Scheme) -> Float32[Array, "*lead out in"]:
    """What codes stand for."""
    scale, zero = _by_column(grid, codes.shape[-1], scheme)
    return scale * (codes.astype(jnp.float32) - zero)


@partial(jax.jit, static_argnames="scheme")
def rtn(w: Float[Array, "*lead out in"], scheme: Scheme) -> AffineArray:
    """The weights rounded to nearest; any leading axes (layers, experts) are mapped over.

    Raises:
      QjaxError: rows that are no whole groups.
    """
    w = w.astype(jnp.float32)
    grid = grid_of(w, scheme)
    return affine(to_codes(w, grid, scheme), grid.scale, grid.zero, scheme.bits)
