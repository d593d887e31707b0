"""GPTQ: columns are rounded one after another, and what each loses is made up for by those not yet rounded.

Paper: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; names
as in its reference, IST-DASLab/gptq's gptq.py (H, percdamp, dead, perm, blocksize, groupsize, W1, Hinv1, Err1).

The reference inverts H and factors the inverse, Hinv^T Hinv = H^-1 with Hinv upper; each block's errors Err1 are then
taken to all columns behind it, W -= Err1 Hinv. Here H = R R^T with R upper is found by one Cholesky decomposition, and
Hinv = R^-1 is made of R's diagonal blocks only. What a block's columns have to make up for is looked up when their turn
comes: with the errors E = W - Q of all columns before them,

    W1 = W[block] + (E R[:, block]) Hinv1,    Hinv1 = R[block, block]^-1,

the same numbers but for rounding (that GPTQ solves a triangular system in R: Chen et al. 2025, "The Geometry of LLM
Quantization"). It costs a quarter of the reference's decompositions, never inverts an ill-conditioned H, and W is read,
not rewritten, block by block. Within a block all is as in the reference.

Where else we differ, and why:
  - a group's grid is refitted to the weights as its own first column finds them, errors of the same block included; the
    reference fits groups that begin within a block to the weights as they were at the block's start.
  - scales are float16, as they are stored, before codes are made with them.
  - a column that no token moves (dead) is rounded to nearest; the reference sets it to zero, which calibration cannot
    tell from anything else, but other text can.
  - where H is not positive definite with so much damping, the damping grows until it is.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from qjax.arrays import QuantizedArray, Scheme, TransformedArray
from qjax.arrays.scheme import CHANNEL, affine
from qjax.quantizers.hessian import alive, factor, plus_diagonal
from qjax.quantizers.rtn import Grid, grid_of, nearest, widened

# Columns that are rounded one by one before the rest of their block is told; rows of E that are read at once.
_COLUMNS, _TILE = 32, 512


class Rounded(NamedTuple):
    """array: AffineArray, or TransformedArray if its columns are in another order. damp: float32 [*lead], the share of
    H's mean diagonal that was added, more than was asked for where H was not positive definite."""

    array: QuantizedArray
    damp: Any


@partial(jax.jit, static_argnames=("scheme", "block_size", "damp", "act_order", "static_groups", "mse"))
def gptq(
    W: Float[Array, "*lead out in"],
    H: Float32[Array, "*lead in in"],
    scheme: Scheme,
    *,
    block_size: int = 128,
    damp: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
    mse: bool = False,
) -> Rounded:
    """The weights quantized for inputs of these second moments; leading axes (layers, experts) are mapped over.

    Args:
      H: symmetric, as `hessian.finish` gives it; its scale does not matter.
      block_size: columns whose errors are taken on at once; whole groups, where these are refitted.
      damp: this share of the mean of H's diagonal is added to it (percdamp).
      act_order: columns in the order of H's diagonal, largest first.
      static_groups: grids of the weights as they are given, groups of columns as they stand; else each group is of
        columns that are rounded one after another, and its grid of the weights as they are by then, so that the result
        of `act_order` is a TransformedArray. A scale for each row or for all is static in any case.
      mse: grids of the least squared error, weighted by what an error of each column costs.

    Raises:
      QjaxError: rows that are no whole groups.
    """
    options = _Options(scheme, block_size, damp, act_order, static_groups, mse)
    solve = partial(_gptq, options=options)
    for _ in range(W.ndim - 2):
        solve = jax.vmap(solve)
    return solve(W.astype(jnp.float32), H)


class _Options(NamedTuple):
    scheme: Scheme
    block_size: int
    damp: float
    act_order: bool
    static_groups: bool
    mse: bool


def _gptq(W: Any, H: Any, *, options: _Options) -> Rounded:
    scheme, n = options.scheme, W.shape[1]
    groups = scheme.groups(n)
    static = options.static_groups or groups == 1
    diag = jnp.diagonal(H)
    H = alive(H)
    order = jnp.arange(n)
    perm = jnp.argsort(-diag, stable=True) if options.act_order else order
    if options.act_order:
        H = jnp.take(jnp.take(H, perm, axis=0, mode="clip"), perm, axis=1, mode="clip")
    R, damp = factor(H, options.damp)
    back = jnp.argsort(perm) if options.act_order else order
    grid = None
    if static:
        grid = grid_of(W, scheme, mse=options.mse, importance=jnp.square(jnp.diagonal(R))[back])
    codes, grid = _rounded(W.T[perm], R, grid, perm // (n // groups) if static else order // (n // groups), options)
    if static and options.act_order:
        codes = jnp.take(codes, back, axis=0, mode="clip")
    array = affine(codes.T, grid.scale.T, None if grid.zero is None else grid.zero.T, scheme.bits)
    if options.act_order and not static:
        return Rounded(TransformedArray(array, columns=perm.astype(jnp.int32)), damp)
    return Rounded(array, damp)


def _rounded(Wt: Any, R: Any, grid: Grid | None, g_idx: Any, options: _Options) -> tuple[Any, Grid]:
    """uint8 codes [in, out] of weights [in, out], both in the order of rounding, and grids [groups, out].

    Args:
      R: see the head of this file.
      grid: as `grid_of` gives it; None to fit each group to its weights as its first column finds them.
      g_idx: group of each column.
    """
    scheme = options.scheme
    n, out = Wt.shape
    groups = scheme.groups(n)
    groupsize = n // groups
    refit = grid is None
    blocksize = max(options.block_size // groupsize, 1) * groupsize if refit else min(options.block_size, n)
    unit = math.gcd(blocksize, groupsize) if refit else blocksize
    step = max(size for size in range(1, _COLUMNS + 1) if unit % size == 0)
    tile = blocksize * max(_TILE // blocksize, 1)
    # Columns of zeros that nothing is connected with fill the last tile.
    pad = -n % tile
    E = jnp.pad(Wt, ((0, pad), (0, 0)))
    R = plus_diagonal(jnp.pad(R, ((0, pad), (0, pad))), (jnp.arange(n + pad) >= n).astype(jnp.float32))
    importance = jnp.square(jnp.diagonal(R))
    g_idx = jnp.pad(g_idx, (0, pad), constant_values=groups - 1)
    if grid is None:
        zero = None if scheme.symmetric else jnp.zeros((groups, out), jnp.uint8)
        grids = Grid(jnp.ones((groups, out), jnp.float16), zero)
    else:
        grids = Grid(grid.scale.T, None if grid.zero is None else grid.zero.T)
    # All at once, before the loop: LAPACK wants its columns side by side, and R would be turned over for each block.
    Hinv = _inverse_blocks(R, blocksize)

    def block(b: Any, carry: Any) -> Any:
        E, codes, grid = carry
        i1 = b * blocksize

        def add_tile(k: Any, total: Any) -> Any:
            rows = lax.dynamic_slice(R, (k * tile, i1), (tile, blocksize))
            rows = jnp.where((k * tile + jnp.arange(tile))[:, None] < i1, rows, 0)
            return total + _dot(rows, lax.dynamic_slice(E, (k * tile, 0), (tile, out)))

        owed = lax.fori_loop(0, (i1 + tile - 1) // tile, add_tile, jnp.zeros((blocksize, out), jnp.float32))
        Hinv1 = lax.dynamic_index_in_dim(Hinv, b, keepdims=False)
        W1 = lax.dynamic_slice(E, (i1, 0), (blocksize, out)) + _dot(Hinv1, owed)

        def columns(s: Any, carry: Any) -> Any:
            W1, E, codes, grid = carry
            j = s * step
            if refit:
                new = lambda grid: _refitted(grid, W1, j, i1 + j, groupsize, importance, options)
                starts = ((i1 + j) % groupsize == 0) & (i1 + j < n)
                grid = lax.cond(starts, new, lambda grid: grid, grid)
            at = lax.dynamic_slice(g_idx, (i1 + j,), (step,))
            scale, zero = widened(jax.tree.map(lambda leaf: leaf[at], grid), scheme)
            zero = jnp.broadcast_to(zero, scale.shape)
            W2 = lax.dynamic_slice(W1, (j, 0), (step, out))
            codes2, Err2 = _one_by_one(W2, lax.dynamic_slice(Hinv1, (j, j), (step, step)), scale, zero, scheme)
            W1 = W1 - _dot(lax.dynamic_slice(Hinv1, (j, 0), (step, blocksize)), Err2)
            left = lax.dynamic_slice(E, (i1 + j, 0), (step, out)) - scale * (codes2 - zero)
            E = lax.dynamic_update_slice(E, left, (i1 + j, 0))
            codes = lax.dynamic_update_slice(codes, codes2.astype(jnp.uint8), (i1 + j, 0))
            return W1, E, codes, grid

        return lax.fori_loop(0, blocksize // step, columns, (W1, E, codes, grid))[1:]

    codes = jnp.zeros((n + pad, out), jnp.uint8)
    _, codes, grids = lax.fori_loop(0, -(-n // blocksize), block, (E, codes, grids))
    return codes[:n], grids


def _inverse_blocks(R: Any, size: int) -> Any:
    """Inverses [blocks, size, size] of the diagonal blocks of an upper triangular matrix."""
    starts = jnp.arange(0, R.shape[0], size)
    blocks = lax.map(lambda i: lax.dynamic_slice(R, (i, i), (size, size)), starts)
    eye = jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), blocks.shape)
    return lax.linalg.triangular_solve(blocks, eye, left_side=True, lower=False)


def _dot(a: Any, b: Any) -> Any:
    """a^T b."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _refitted(grid: Grid, W1: Any, j: Any, column: Any, groupsize: int, importance: Any, options: _Options) -> Grid:
    """The grids with that of the group that begins at row j of a block, column `column` of all."""
    weights = lax.dynamic_slice(W1, (j, 0), (groupsize, W1.shape[1])).T
    of_row = Scheme(options.scheme.bits, CHANNEL, options.scheme.symmetric)
    costs = lax.dynamic_slice(importance, (column,), (groupsize,))
    new = grid_of(weights, of_row, mse=options.mse, importance=costs)
    put = lambda held, new: lax.dynamic_update_slice(held, new.T, (column // groupsize, 0))
    return jax.tree.map(put, grid, new)


def _one_by_one(W2: Any, Hinv2: Any, scale: Any, zero: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Codes, as floats, and Err1 of a few columns [columns, out]; the reference's inner loop."""

    def column(i: Any, carry: Any) -> Any:
        codes, Err2 = carry
        # The reference takes each error to all columns behind it; to look it up writes less. Err2 is 0 from i on.
        w = W2[i] - Hinv2[:, i] @ Err2
        code = nearest(w, scale[i], zero[i], scheme)
        err = (w - scale[i] * (code - zero[i])) / Hinv2[i, i]
        return codes.at[i].set(code), Err2.at[i].set(err)

    none = jnp.zeros_like(W2)
    return lax.fori_loop(0, W2.shape[0], column, (none, none))
