"""Products with activations rounded to int8: integer arithmetic inside a group, floats across groups.

y[m, o] = sum_g sx[m, g] * (scale[o, g] * sum_{i in g} qx[m, i] * code[o, i] + minimum[o, g] * sum_{i in g} qx[m, i])

with x ~ sx * qx, one scale for each 32 columns of x, whatever the weight's groups are (as ggml for its types of 32;
under K-quants it has one for 256). It changes the numbers (by 0.5 to 1 % of the output's largest
value), so it is a named choice: `activations="int8"`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from qjax.arrays import GroupedArray
from qjax.kernels.tiles import matmul_tiles

# Columns of x that share a scale.
GROUP = 32


def quantize_activations(
    x: Float[Array, "rows in"], group_size: int = GROUP
) -> tuple[Integer[Array, "rows groups group"], Float[Array, "rows groups"]]:
    """Symmetric int8 of x by groups of columns: the largest magnitude of a group becomes 127.

    A group that is not finite gets NaN for a scale. The last group is filled up with zeros.
    """
    rows, columns = x.shape
    grouped = jnp.pad(x, ((0, 0), (0, -columns % group_size))).reshape(rows, -1, group_size)
    scale = jnp.max(jnp.abs(grouped), axis=-1) / 127
    inverse = jnp.where(scale > 1e-37, 1 / jnp.where(scale > 1e-37, scale, 1), 0)
    # Written so that NaN is not finite.
    scale = jnp.where(scale < jnp.inf, scale, jnp.nan)
    return jnp.round(grouped * inverse[..., None]).astype(jnp.int8), scale


@jax.jit
def matmul_int8_few(x: Float[Array, "rows in"], weight: GroupedArray) -> Float[Array, "rows out"]:
    """For few rows: each part's integer dot product as a multiply and a sum that XLA fuses with the unpacking.

    A part is what shares a scale of x and one of the weight.
    """
    out, columns = weight.shape
    part = math.gcd(weight.group_size, GROUP)
    qx, sx = quantize_activations(x)
    rows, parts = x.shape[0], columns // part
    qx = qx.reshape(rows, -1)[:, :columns].reshape(rows, parts, part)
    sx = jnp.repeat(sx, GROUP // part, axis=1)[:, :parts]
    codes = weight.codes().reshape(out, parts, part).astype(jnp.int32)
    scales, minimums = weight.group_scales()
    scales = jnp.repeat(scales, weight.group_size // part, axis=1)
    if minimums is not None:
        minimums = jnp.repeat(minimums, weight.group_size // part, axis=1)

    def row(q: Integer[Array, "parts part"], s: Float[Array, " parts"]) -> Float[Array, " out"]:
        wide = q.astype(jnp.int32)
        dots = jnp.sum(codes * wide[None], axis=-1).astype(jnp.float32)
        y = (dots * scales) @ s
        if minimums is not None:
            y = y + minimums @ (s * jnp.sum(wide, axis=-1).astype(jnp.float32))
        return y

    return jnp.stack([row(qx[i], sx[i]) for i in range(rows)]) if rows else jnp.zeros((0, out), jnp.float32)


@jax.jit
def matmul_int8_many(x: Float[Array, "rows in"], weight: Any) -> Float[Array, "rows out"]:
    """For many rows: the same rounding of x, multiplied as floats tile by tile.

    A float product of integers below 2**24 is what the integers give; on CPUs without 8-bit dot products it is faster.
    """
    qx, sx = quantize_activations(x)
    rounded = (qx.astype(jnp.float32) * sx[..., None]).reshape(x.shape[0], -1)[:, : x.shape[1]]
    return matmul_tiles(rounded, weight)
