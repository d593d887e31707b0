"""What methods share of making packed weights, and of saying what was lost."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.arrays import QuantizedArray, Scheme, TransformedArray


def with_activations(array: QuantizedArray, scheme: Scheme) -> QuantizedArray:
    """The weight with its input rounded, if the scheme says so."""
    if scheme.activations == "float":
        return array
    if isinstance(array, TransformedArray):
        return array.replace(rounding="int8")  # pyright: ignore[reportAttributeAccessIssue]
    return TransformedArray(array, rounding="int8")


@jax.jit
def lost(
    made: QuantizedArray,
    true: Float[Array, "out in"],
    H: Float32[Array, "in in"] | None = None,
    *,
    rows: Float32[Array, " out"] | None = None,
) -> Float32[Array, ""]:
    """Mean square of made less true weights over that of the true; with H, of their products with inputs of it.

    `rows`: what each row is multiplied with first.
    """
    weight = jnp.float32(1) if rows is None else rows[:, None]
    true = true.astype(jnp.float32)
    size = lambda w: jnp.sum(w * (w if H is None else w @ H))
    return size((made.dequantize() - true) * weight) / jnp.maximum(size(true * weight), jnp.float32(1e-30))
