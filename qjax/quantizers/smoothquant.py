"""SmoothQuant: what is hard to round in activations is moved to the weights, column by column, before both are int8.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models":

    s_j = max|x_j|**alpha / max|W_j|**(1 - alpha)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from qjax.arrays.scheme import Scheme
from qjax.arrays.transformed import round_activations
from qjax.quantizers.columns import Chosen, choose, tied
from qjax.quantizers.rtn import from_codes, grid_of, to_codes

ALPHAS = tuple(i / 20 for i in range(21))


def smooth_scale(
    x_most: Float32[Array, " in"],
    w_most: Float32[Array, " in"],
    alpha: Float32[Array, ""] | float,
    ties: Int32[Array, " in"] | None = None,
) -> Float32[Array, " in"]:
    """s of one alpha; a column without activations or weights is left as it is.

    Args:
      x_most: largest |x| of each column. w_most: largest |w| of each column, over all matrices that share the input.
      ties: columns with the same number get the same scale, the geometric mean of theirs; None for all free.
    """
    s = x_most**alpha / jnp.maximum(w_most, jnp.float32(1e-5)) ** (1 - alpha)
    s = jnp.where((x_most > 0) & (w_most > 0), s, jnp.float32(1))
    return s if ties is None else tied(s, ties)


@partial(jax.jit, static_argnames=("schemes", "alphas"))
def search_alpha(
    ws: tuple[Any, ...],
    schemes: tuple[Scheme, ...],
    x_most: Float32[Array, " in"],
    x: Float32[Array, "tokens in"],
    ties: Int32[Array, " in"] | None = None,
    *,
    alphas: tuple[float, ...] = ALPHAS,
) -> Chosen:
    """The scale of the alpha with which the products change least when weights and activations are both rounded.

    Args:
      ws: float32 [out, in] matrices that share an input.
      x: some of the inputs, to be rounded to int8 where a scheme says so.

    Raises:
      QjaxError: rows that are no whole groups.
    """
    w_most = jnp.stack([jnp.abs(w).max(0) for w in ws]).max(0)
    by_alpha = jax.vmap(lambda alpha: smooth_scale(x_most, w_most, alpha, ties))(jnp.asarray(alphas, jnp.float32))

    def error(s: Float32[Array, " in"]) -> Float32[Array, ""]:
        total = jnp.float32(0)
        for w, scheme in zip(ws, schemes, strict=True):
            grid = grid_of(w * s[None], scheme)
            rounded = from_codes(to_codes(w * s[None], grid, scheme), grid, scheme)
            total += jnp.sum(jnp.square(_inputs(x / s[None], scheme) @ rounded.T - x @ w.T))
        return total

    return choose(by_alpha, error)


def _inputs(x: Float32[Array, "tokens in"], scheme: Scheme) -> Float32[Array, "tokens in"]:
    if scheme.activations != "int8":
        return x
    codes, scale = round_activations(x, "int8")
    return codes.astype(jnp.float32) * scale
