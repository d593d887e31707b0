"""What quantizers that scale columns know of a matrix' inputs: sums over calibration tokens, batch by batch.

With the second moments H = sum x x^T the squared error of a matrix' products over all tokens is exact, whatever their
number: sum |D x|^2 = tr(D H D^T) for an error D of the matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Moments(NamedTuple):
    """float32 tokens []: how many; absolute [in]: sum of |x|; most [in]: largest |x|; second [in, in]: sum of x x^T."""

    tokens: Any
    absolute: Any
    most: Any
    second: Any


@jax.jit
def moments(x: Float[Array, "*tokens in"]) -> Moments:
    """Of one batch."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    absolute = jnp.abs(x)
    return Moments(jnp.float32(len(x)), absolute.sum(0), absolute.max(0), x.T @ x)


@jax.jit
def both(a: Moments, b: Moments) -> Moments:
    """Of the tokens of two; the order matters to the last bits."""
    return Moments(a.tokens + b.tokens, a.absolute + b.absolute, jnp.maximum(a.most, b.most), a.second + b.second)


def scaled(second: Float32[Array, "in in"], scale: Float32[Array, " in"]) -> Float32[Array, "in in"]:
    """The second moments of x / scale."""
    return second / (scale[:, None] * scale[None])


def squared_error(error: Float32[Array, "out in"], second: Float32[Array, "in in"]) -> Float32[Array, ""]:
    """sum |D x|^2 for an error D of the matrix."""
    return jnp.sum((error @ second) * error)
