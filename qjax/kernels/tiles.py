"""y = x @ w.T by tiles of rows: dequantize a tile, multiply, go on.

XLA:CPU does not fuse a dequantize into a dot: given the whole weight it first writes all its floats to memory. A loop
over tiles bounds that buffer to one tile, small enough to stay in a core's cache for few rows of x, larger where many
rows share it. Serves every family, float16 and bfloat16 included, on every backend.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.arrays import QuantizedArray
from qjax.arrays.floats import bf16_to_f32

# Floats in one tile, for few rows of x and for many; larger ones gain little.
TILE_FEW, TILE_MANY, MANY = 1 << 15, 1 << 19, 16


def as_floats(weight: Any) -> Float[Array, "out in"]:
    """float32 of a packed or a float weight; uint16 are the bits of bfloat16."""
    if isinstance(weight, QuantizedArray):
        return weight.dequantize()
    return bf16_to_f32(weight) if weight.dtype == jnp.uint16 else weight.astype(jnp.float32)


def _sliceable(weight: Any) -> Any:
    """XLA:CPU has no bfloat16 slices: it would first make all of the weight float32. Of its bits it has."""
    if isinstance(weight, QuantizedArray) or weight.dtype != jnp.bfloat16:
        return weight
    return lax.bitcast_convert_type(weight, jnp.uint16)


def rows_of(weight: Any, start: Any, count: int) -> Any:
    """`count` rows of a packed or float weight from row `start` on, leaf by leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, count, axis=0), weight)


def tile_rows(rows: int, shape: tuple[int, ...]) -> int:
    """Rows of the weight in one tile, given how many rows x has."""
    out, columns = shape
    wanted = max(8, (TILE_MANY if rows >= MANY else TILE_FEW) // columns // 8 * 8)
    # Never more than a quarter of a weight that is worth cutting.
    return out if out <= 8 else min(wanted, max(8, out // 32 * 8))


@jax.jit
def matmul_tiles(x: Float[Array, "rows in"], weight: Any) -> Float[Array, "rows out"]:
    """float32 x @ dequantize(weight).T, holding the floats of one tile of the weight at a time."""
    out = weight.shape[0]
    count = tile_rows(x.shape[0], weight.shape)
    tiles = -(-out // count)
    weight = _sliceable(weight)

    def body(i: Any, y: Float[Array, "rows out"]) -> Float[Array, "rows out"]:
        # The last tile starts early rather than being shorter: its rows are computed twice, to the same values.
        start = jnp.minimum(i * count, out - count)
        tile = as_floats(rows_of(weight, start, count))
        part = lax.dot_general(x, tile, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(y, part, start, axis=1)

    return lax.fori_loop(0, tiles, body, jnp.zeros((x.shape[0], out), jnp.float32))
