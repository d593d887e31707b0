"""Scales for the columns of matrices that share an input: how they are tied, and chosen among candidates.

y = W x = (W diag(s)) (x / s)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32


class Chosen(NamedTuple):
    """scale: float32 [in]. candidate: int32 [], its number. errors: float32 [candidates], by which it was chosen."""

    scale: Any
    candidate: Any
    errors: Any


def tied(scale: Float32[Array, " in"], ties: Int32[Array, " in"]) -> Float32[Array, " in"]:
    """Positive scales with the geometric mean of all columns of the same number, from 0 to in - 1, in each."""
    sums = lambda x: jnp.zeros_like(x).at[ties].add(x)
    mean = sums(jnp.log(scale)) / jnp.maximum(sums(jnp.ones_like(scale)), 1)
    return jnp.exp(mean)[ties]


def choose(scales: Float32[Array, "n in"], error: Callable[[Float32[Array, " in"]], Float32[Array, ""]]) -> Chosen:
    """The scale of the least error, of ones (candidate 0) and `scales` (1 and on); one is computed at a time."""
    candidates = jnp.concatenate([jnp.ones_like(scales[:1]), scales])
    errors = lax.map(error, candidates)
    best = jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf)).astype(jnp.int32)
    return Chosen(candidates[best], best, errors)
