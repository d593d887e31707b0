"""Learned rounding: which way each weight is rounded and what grid each group has, by the gradient of any loss.

Paper: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", and its
code, AutoRound: offsets V within half a step are added before rounding, the grids are learned with them, gradients pass
through the rounding as if it were not there (Bengio et al. 2013), and each step goes by the gradient's sign. Other than
there, any quantizer's result may be the start, and of a grid its scale and zero point are learned, not its two ends.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from qjax.arrays.affine import AffineArray
from qjax.arrays.scheme import TENSOR, Scheme, affine, codes_of

# Offsets of the rounding stay within half a step, scales within half of the start's.
MOST_ROUNDING, MOST_SCALE = 0.5, 0.5
# The smallest scale, float16's smallest number above 0.
_LEAST = 2.0**-24


class Anchor(NamedTuple):
    """What stays: float32 weights [out, groups, size] that the start's grids round to the start's codes, and its
    scales and zero points [out, groups, 1], as floats."""

    w: Any
    scale: Any
    zero: Any


class Offsets(NamedTuple):
    """What is learned, float32 and 0 at the start: `rounding` [out, groups, size] in steps of the grid, `scale`
    [out, groups, 1] in parts of the start's, `zero` of that shape in parts of the middle code, None for symmetric
    grids. With one scale for all of a matrix the last two are [1, 1, 1]."""

    rounding: Any
    scale: Any
    zero: Any


@jax.custom_jvp
def _rounded(x: Any) -> Any:
    return jnp.round(x)


@jax.custom_jvp
def _stored(scale: Any) -> Any:
    """A scale as float16 holds it."""
    return jnp.clip(scale, _LEAST, 65504).astype(jnp.float16).astype(jnp.float32)


_rounded.defjvp(lambda primals, tangents: (_rounded(*primals), *tangents))
_stored.defjvp(lambda primals, tangents: (_stored(*primals), *tangents))


@partial(jax.jit, static_argnames=("scheme", "reach"))
def anchored(
    w: Float[Array, "out in"], start: AffineArray, scheme: Scheme, reach: float = 0.49
) -> tuple[Anchor, Offsets]:
    """Where a start leaves one matrix: what stays, and offsets of 0.

    Args:
      w: the true weights. Those that lie far from their codes, since the start did not round to nearest (GPTQ's make up
        for errors of others), are moved nearer to them.
      start: of the same shape, made for `scheme`.
      reach: how far from its code a weight may lie, in steps, less than half a one. Near to it the first steps of
        descent round many weights the other way at once, and undo what GPTQ made fit together.
    """
    scale = start.scales()[..., None]
    middle = jnp.full(scale.shape, scheme.middle, jnp.float32)
    zero = middle if start.zero is None else start.zero.astype(jnp.float32)[..., None]
    shape = (*scale.shape[:-1], start.group_size)
    codes = codes_of(start).astype(jnp.float32).reshape(shape)
    # Past the ends of the grid all is rounded to its last codes.
    low = jnp.where(codes == 0, -jnp.inf, codes - reach)
    high = jnp.where(codes == scheme.max_code, jnp.inf, codes + reach)
    within = jnp.clip(w.astype(jnp.float32).reshape(shape) / scale + zero, low, high)
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)
    grids = (1, 1, 1) if scheme.group_size == TENSOR else scale.shape
    offsets = Offsets(zeros(shape), zeros(grids), None if scheme.symmetric else zeros(grids))
    return Anchor((within - zero) * scale, scale, zero), offsets


def _quantized(offsets: Offsets, anchor: Anchor, scheme: Scheme) -> tuple[Any, Any, Any]:
    """Codes, scales and zero points, as float32 of whole numbers and of float16's numbers."""
    scale = _stored(anchor.scale * (1 + offsets.scale))
    zero = anchor.zero
    if offsets.zero is not None:
        zero = jnp.clip(_rounded(zero + scheme.middle * offsets.zero), 0, scheme.max_code)
    codes = _rounded(anchor.w / scale + offsets.rounding) + zero
    return jnp.clip(codes, 0, scheme.max_code), scale, zero


def fake_quantized(offsets: Offsets, anchor: Anchor, scheme: Scheme) -> Float32[Array, "out in"]:
    """The floats that `packed` stands for, to the bit; differentiable in the offsets."""
    codes, scale, zero = _quantized(offsets, anchor, scheme)
    return (scale * (codes - zero)).reshape(len(codes), -1)


@partial(jax.jit, static_argnames="scheme")
def packed(offsets: Offsets, anchor: Anchor, scheme: Scheme) -> AffineArray:
    """The array that the offsets mean."""
    codes, scale, zero = _quantized(offsets, anchor, scheme)
    stored_zero = None if scheme.symmetric else zero[..., 0].astype(jnp.uint8)
    codes = codes.astype(jnp.uint8).reshape(len(codes), -1)
    return affine(codes, scale[..., 0].astype(jnp.float16), stored_zero, scheme.bits)


def bounded(offsets: Offsets) -> Offsets:
    """The nearest offsets that are allowed."""
    box = optax.projections.projection_box
    zero = None if offsets.zero is None else box(offsets.zero, -1.0, 1.0)
    rounding, scale = box(offsets.rounding, -MOST_ROUNDING, MOST_ROUNDING), box(offsets.scale, -MOST_SCALE, MOST_SCALE)
    return Offsets(rounding, scale, zero)


def descended(
    offsets: Offsets, slopes: Offsets, rate: Float32[Array, ""], grid_share: float | Float32[Array, ""] = 1.0
) -> Offsets:
    """After a step of this size by the sign of the loss' gradient, `slopes`; by this share of it for the grids."""
    descent = optax.sign_sgd(rate)
    updates: Any = descent.update(slopes, descent.init(offsets))[0]  # pyright: ignore[reportArgumentType]
    grids = [None if update is None else grid_share * update for update in updates[1:]]
    moved: Any = optax.apply_updates(offsets, Offsets(updates.rounding, *grids))  # pyright: ignore[reportArgumentType]
    return bounded(moved)
