"""Products with activations rounded to int8: integer arithmetic inside a group, floats across groups.

y[m, o] = sum_g sx[m, g] * (scale[o, g] * sum_{i in g} qx[m, i] * code[o, i] + minimum[o, g] * sum_{i in g} qx[m, i])

with x ~ sx * qx, one scale for each group of the weight's columns, as ggml does. It changes the numbers (by 0.5 to 1 %
of the output's largest value), so it is a named choice: `activations="int8"`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from qjax.arrays import GroupedArray
from qjax.kernels.tiles import matmul_tiles


def quantize_activations(
    x: Float[Array, "rows in"], group_size: int
) -> tuple[Integer[Array, "rows groups group"], Float[Array, "rows groups"]]:
    """Symmetric int8 of x by groups of columns: the largest magnitude of a group becomes 127."""
    grouped = x.reshape(x.shape[0], -1, group_size)
    scale = jnp.max(jnp.abs(grouped), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return jnp.round(grouped * inverse[..., None]).astype(jnp.int8), scale


@jax.jit
def matmul_int8_few(x: Float[Array, "rows in"], weight: GroupedArray) -> Float[Array, "rows out"]:
    """For few rows: each group's integer dot product as a multiply and a sum that XLA fuses with the unpacking."""
    qx, sx = quantize_activations(x, weight.group_size)
    out, columns = weight.shape
    codes = weight.codes().reshape(out, columns // weight.group_size, weight.group_size).astype(jnp.int32)
    scales, minimums = weight.group_scales()

    def row(q: Integer[Array, "groups group"], s: Float[Array, " groups"]) -> Float[Array, " out"]:
        wide = q.astype(jnp.int32)
        dots = jnp.sum(codes * wide[None], axis=-1).astype(jnp.float32)
        y = (dots * scales) @ s
        if minimums is not None:
            y = y + minimums @ (s * jnp.sum(wide, axis=-1).astype(jnp.float32))
        return y

    return jnp.stack([row(qx[i], sx[i]) for i in range(x.shape[0])]) if x.shape[0] else jnp.zeros((0, out), jnp.float32)


@jax.jit
def matmul_int8_many(x: Float[Array, "rows in"], weight: Any) -> Float[Array, "rows out"]:
    """For many rows: the same rounding of x, multiplied as floats tile by tile.

    A float product of integers below 2**24 is what the integers give; on CPUs without 8-bit dot products it is faster.
    """
    qx, sx = quantize_activations(x, weight.group_size)
    return matmul_tiles((qx.astype(jnp.float32) * sx[..., None]).reshape(x.shape), weight)
