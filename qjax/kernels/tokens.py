"""Products with activations rounded to int8 token by token, as W8A8 checkpoints want them: integers up to the scales.

y[m, o] = sx[m] * sum_g scale[o, g] * (sum_{i in g} qx[m, i] * code[o, i] - zero[o, g] * sum_{i in g} qx[m, i])

with x ~ sx * qx; most such weights have one group, a scale for each row. The integer sums are exact in 32 bits. Source:
compressed-tensors, whose fake quantization multiplies the same numbers as floats.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from qjax.arrays import AffineArray, TransformedArray
from qjax.arrays.transformed import round_activations
from qjax.kernels.tiles import rows_of, tile_rows


def multiplies_tokens(weight: Any) -> bool:
    """Whether `matmul_tokens` serves what lies in a transformed weight: signed bytes under scales."""
    return isinstance(weight, AffineArray) and weight.minimum is None and (weight.bits < 8 or weight.offset == 128)


@jax.jit
def matmul_tokens(x: Float[Array, "rows in"], weight: TransformedArray) -> Float[Array, "rows out"]:
    """float32 product of x, rounded as `weight` says, with the codes of what lies in it, by tiles of rows."""
    rows, inner = x.shape[0], weight.inner
    out = inner.shape[0]
    codes, scale = round_activations(weight.transform(x), "int8", weight.x_scale)
    if rows < 2:
        # XLA:CPU would make 32-bit integers of all codes for one row alone.
        codes = jnp.pad(codes, ((0, 2 - rows), (0, 0)))
    count = tile_rows(rows, inner.shape)

    def body(i: Any, y: Float[Array, "padded out"]) -> Float[Array, "padded out"]:
        # As in `matmul_tiles`: the last tile starts early.
        start = jnp.minimum(i * count, out - count)
        return lax.dynamic_update_slice_in_dim(y, _tile(codes, rows_of(inner, start, count)), start, axis=1)

    y = lax.fori_loop(0, -(-out // count), body, jnp.zeros((codes.shape[0], out), jnp.float32))
    return y[:rows] * scale


def _tile(codes: Int8[Array, "rows in"], weight: AffineArray) -> Float[Array, "rows out"]:
    scales = weight.scales()
    split = lambda a: a.reshape(a.shape[0], scales.shape[-1], -1)
    q = split(codes)
    dots = lax.dot_general(q, split(weight.codes()), (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.int32)
    if weight.zero is not None:
        sums = jnp.sum(q, axis=-1, dtype=jnp.int32)
        dots = dots - sums.T[:, :, None] * weight.zero.astype(jnp.int32).T[:, None, :]
    return jnp.einsum("gmo,og->mo", dots.astype(jnp.float32), scales, precision=lax.Precision.HIGHEST)
