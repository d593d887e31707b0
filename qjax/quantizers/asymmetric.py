"""Weights that make up for inputs which are not the float model's: what GPTQ is to round, instead of W.

Behind quantized layers a matrix is given x, where the float model's was given x~. Of all Q the one nearest to the float
model's products, E |Q x - W x~|^2, is

    W' = W + E[W (x~ - x) x^T] H^-1,

and for any other, E |Q x - W x~|^2 = tr((Q - W') H (Q - W')^T) + what no Q can mend: rounding W' for H is rounding for
the float model's products. Where the products are added to the residual stream, what that lacks by then is added to
W (x~ - x), so that attention's and the feed-forward's output matrices mend the stream itself.

Paper: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", which takes the same
error in column by column; in closed form also in Zhang et al. 2025, "Qronos". The residual stream is ours.
"""

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float32

from qjax.quantizers.hessian import alive, factor


@partial(jax.jit, static_argnames="damp")
def compensated(
    W: Float32[Array, "out in"],
    H: Float32[Array, "in in"],
    lack: Float32[Array, "out in"],
    share: Float32[Array, ""],
    *,
    damp: float = 0.01,
) -> Float32[Array, "out in"]:
    """W', or a share of the way to it.

    Args:
      lack: 2 E[(y~ - y) x^T], of products (and what they are added to) in the float model less those with x; as
        `hessian.finish` gives it.
      damp: see `hessian.factor`; it draws W' to W.
    """
    R, _ = factor(alive(H), damp)
    solve = partial(lax.linalg.triangular_solve, R, left_side=False, lower=False)
    return W + share * solve(solve(lack, transpose_a=True))


def trusted_share(columns: int, tokens: int) -> float:
    """How far to go: of a regression on so many columns, so much is no accident of so many tokens."""
    return max(0.0, 1 - columns / tokens)
