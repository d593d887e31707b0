"""The searches of ggml's encoders: scales, minimums and codes of many groups at once, by weighted squared error.

Source: make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants and make_qp_quants of llama.cpp's
ggml/src/ggml-quants.c. A group is a column: arrays are float32 [n, ...], so that groups lie side by side in registers,
and sums run down the column in ggml's order. Where a compiler may fuse a multiplication and an addition,
XLA may too: a code can differ from ggml's where two candidates are as good as equal.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from qjax.arrays.codebook import IQ4_VALUES

Groups = Float32[Array, "n *groups"]
PerGroup = Float32[Array, "*groups"]

# Below this largest magnitude ggml takes a group for zeros.
TINY = np.float32(1e-15)
_SIGNED_STEPS = [step for step in range(-9, 10) if step]
_POSITIVE_STEPS = [step for step in range(-4, 5) if step]
_TRIES = 5
_IQ4_TRIES = 7
IQ4_EDGE = -IQ4_VALUES[0]


class Found(NamedTuple):
    """w ~ scale * code (- offset) - minimum; codes are whole numbers in float32."""

    scale: PerGroup
    codes: Groups
    minimum: PerGroup | None = None


# XLA:CPU sums few rows one number at a time, 16 times as slow as it could; this many in whole registers.
ROWS_SUMMED_WELL = 32


def total(terms: Groups) -> PerGroup:
    """Sum down the column, one after the other."""
    if terms.shape[0] >= ROWS_SUMMED_WELL:
        return jnp.sum(terms, axis=0, dtype=jnp.float32)
    result = terms[0]
    for i in range(1, terms.shape[0]):
        result = result + terms[i]
    return result


def largest(x: Groups) -> tuple[PerGroup, PerGroup]:
    """(largest magnitude, the first number that has it)."""
    size, number = jnp.abs(x[0]), x[0]
    for i in range(1, x.shape[0]):
        here = jnp.abs(x[i])
        number = jnp.where(here > size, x[i], number)
        size = jnp.maximum(here, size)
    return size, number


def divided(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    none = b == 0
    return jnp.where(none, np.float32(0), a / jnp.where(none, np.float32(1), b))


def inverse(x: PerGroup) -> PerGroup:
    """1 / x, and 0 where x is 0."""
    return divided(jnp.ones_like(x), x)


def symmetric(x: Groups, weights: Groups, top: int) -> Found:
    """make_qx_quants: codes 0 ... 2 top - 1 for -top ... top - 1; of 19 scales the best, by least squares."""
    size, number = largest(x)
    zero = size < TINY
    number = jnp.where(zero, np.float32(1), number)

    def codes(inverse: PerGroup) -> Groups:
        return jnp.clip(jnp.round(inverse[None] * x), np.float32(-top), np.float32(top - 1))

    def sums(inverse: PerGroup) -> tuple[PerGroup, PerGroup]:
        code = codes(inverse)
        return total(weights * x * code), total(weights * code * code)

    first = np.float32(-top) / number
    product, square = sums(first)
    scale = divided(product, square)

    def step(state: Any, nudge: Any) -> Any:
        scale, best, inverse = state
        tried = nudge / number
        product, square = sums(tried)
        better = (square > 0) & (product * product > best * square)
        candidate = divided(product, square)
        scale = jnp.where(better, candidate, scale)
        return (scale, jnp.where(better, candidate * product, best), jnp.where(better, tried, inverse)), None

    nudges = np.array([-(np.float32(top) + np.float32(0.1) * np.float32(s)) for s in _SIGNED_STEPS], np.float32)
    (scale, _, inverse), _ = lax.scan(step, (scale, scale * product, first), jnp.asarray(nudges))
    return Found(
        jnp.where(zero, np.float32(0), scale), jnp.where(zero[None], np.float32(0), codes(inverse) + np.float32(top))
    )


def iq4_codes(x: Groups) -> Groups:
    """Index of the nearest of IQ4's values, the higher of two as near."""
    code = jnp.zeros_like(x)
    for low, high in pairwise(IQ4_VALUES):
        code = code + (x >= np.float32((low + high) / 2)).astype(jnp.float32)
    return code


def iq4_values(x: Groups) -> Groups:
    """The nearest of IQ4's values."""
    value = jnp.full_like(x, IQ4_VALUES[0])
    for low, high in pairwise(IQ4_VALUES):
        value = value + jnp.where(x >= np.float32((low + high) / 2), np.float32(high - low), np.float32(0))
    return value


def non_linear(x: Groups, weights: Groups) -> Found:
    """quantize_row_iq4_nl_impl: codes 0 ... 15 of IQ4's values; of 16 scales the best, by least squares."""
    size, number = largest(x)
    zero = size < TINY
    number = jnp.where(zero, np.float32(1), number)

    def sums(inverse: PerGroup) -> tuple[PerGroup, PerGroup]:
        value = iq4_values(inverse[None] * x)
        weighted = weights * value
        return total(weighted * x), total(weighted * value)

    edge = np.float32(IQ4_EDGE)
    # ggml's first try has the sign turned: the largest magnitude goes to 113 and not to -127.
    product, square = sums(np.float32(1) / (number / edge))
    scale = divided(product, square)

    def step(state: Any, nudge: Any) -> Any:
        scale, best = state
        product, square = sums((nudge - edge) / number)
        better = (square > 0) & (product * product > best * square)
        candidate = divided(product, square)
        return (jnp.where(better, candidate, scale), jnp.where(better, candidate * product, best)), None

    nudges = jnp.arange(-_IQ4_TRIES, _IQ4_TRIES + 1, dtype=jnp.float32)
    (scale, _), _ = lax.scan(step, (scale, scale * product), nudges)
    scale = jnp.where(zero, np.float32(0), scale)
    return Found(scale, iq4_codes(inverse(scale)[None] * x))


def _descend(
    x: Groups,
    weights: Groups,
    codes: Groups,
    low: int,
    top: int,
    product: PerGroup,
    square: PerGroup,
    *,
    signed: bool,
) -> tuple[Groups, PerGroup, PerGroup]:
    """One code after the other moved to where the others' scale wants it, as long as that helps; five times."""

    def turn(i: Any, state: Any) -> Any:
        codes, product, square = state
        xi, w, code = x[i], weights[i], codes[i]
        other_product = product - w * xi * code
        other_square = square - w * code * code
        able = (other_product > 0) if signed else (other_product > 0) & (other_square > 0)
        wanted = jnp.round(xi * other_square / jnp.where(able, other_product, np.float32(1)))
        wanted = jnp.clip(wanted, np.float32(low), np.float32(top)) if signed else jnp.minimum(wanted, np.float32(top))
        new_product = other_product + w * xi * wanted
        new_square = other_square + w * wanted * wanted
        better = new_product * new_product * square > product * product * new_square
        moved = able & (wanted != code) & better & ((new_square > 0) if signed else True)
        codes = codes.at[i].set(jnp.where(moved, wanted, code))
        return codes, jnp.where(moved, new_product, product), jnp.where(moved, new_square, square)

    n = x.shape[0]
    return lax.fori_loop(0, _TRIES * n, lambda step, state: turn(step % n, state), (codes, product, square))


def three_bits(x: Groups, top: int = 4) -> Found:
    """make_q3_quants: codes 0 ... 2 top - 1, weights x^2, by coordinate descent."""
    size, number = largest(x)
    zero = size < TINY
    inverse = np.float32(-top) / jnp.where(zero, np.float32(1), number)
    weights = x * x
    codes = jnp.clip(jnp.round(inverse[None] * x), np.float32(-top), np.float32(top - 1))
    product, square = total(weights * x * codes), total(weights * codes * codes)
    codes, product, square = _descend(x, weights, codes, -top, top - 1, product, square, signed=True)
    scale = jnp.where(zero | (square <= 0), np.float32(0), divided(product, square))
    return Found(scale, jnp.where(zero[None], np.float32(0), codes + np.float32(top)))


def positive(x: Groups, weights: Groups, top: int) -> Found:
    """make_qp_quants: codes 0 ... top of numbers that are not negative, such as the scales of a super-block."""
    most = jnp.maximum(jnp.max(x, axis=0), np.float32(0))
    zero = most < TINY
    most = jnp.where(zero, np.float32(1), most)

    def error(inverse: PerGroup, codes: Groups) -> PerGroup:
        difference = x - (np.float32(1) / inverse)[None] * codes
        return total(weights * difference * difference)

    inverse = np.float32(top) / most
    best = error(inverse, jnp.round(inverse[None] * x))
    for step in _POSITIVE_STEPS:
        tried = (np.float32(0.1) * np.float32(step) + np.float32(top)) / most
        here = error(tried, jnp.minimum(jnp.round(tried[None] * x), np.float32(top)))
        inverse = jnp.where(here < best, tried, inverse)
        best = jnp.where(here < best, here, best)
    codes = jnp.minimum(jnp.round(inverse[None] * x), np.float32(top))
    product, square = total(weights * x * codes), total(weights * codes * codes)
    codes, product, square = _descend(x, weights, codes, 0, top, product, square, signed=False)
    scale = jnp.where(zero | (square <= 0), np.float32(0), divided(product, square))
    return Found(scale, jnp.where(zero[None], np.float32(0), codes))


def affine(
    x: Groups, weights: Groups, top: int, *, low_step: float, step: float, steps: int, absolute: bool = False
) -> Found:
    """make_qkx2_quants and make_qkx3_quants: codes 0 ... top, w ~ scale * code - minimum, minimum >= 0.

    Of `steps` + 1 inverse scales, (low_step + step * i + top) / range, the best after least squares for both numbers.

    Args:
      absolute: compare the weighted sum of |differences|, not of their squares.
    """
    sum_w, sum_x = total(weights), total(weights * x)
    low, high = jnp.minimum(jnp.min(x, axis=0), np.float32(0)), jnp.max(x, axis=0)
    flat = high <= low

    def codes(inverse: PerGroup, low: PerGroup) -> Groups:
        return jnp.clip(jnp.round(inverse[None] * (x - low[None])), np.float32(0), np.float32(top))

    def error(scale: PerGroup, minimum: PerGroup, code: Groups) -> PerGroup:
        difference = scale[None] * code + minimum[None] - x
        return total(weights * (jnp.abs(difference) if absolute else difference * difference))

    first = np.float32(top) / jnp.where(flat, np.float32(1), high - low)
    scale = np.float32(1) / first
    best = error(scale, low, codes(first, low))

    def attempt(state: Any, nudge: Any) -> Any:
        # The range that is tried goes from the best minimum so far, as ggml has it.
        _, minimum, best, *_ = state
        tried = nudge / jnp.where(flat, np.float32(1), high - minimum)
        code = codes(tried, minimum)
        weighted = weights * code
        sum_l, sum_l2, sum_xl = total(weighted), total(weighted * code), total(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        able = determinant > 0
        divisor = jnp.where(able, determinant, np.float32(1))
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        above = new_minimum > 0
        new_scale = jnp.where(above, divided(sum_xl, sum_l2), new_scale)
        new_minimum = jnp.where(above, np.float32(0), new_minimum)
        here = error(new_scale, new_minimum, code)
        better = able & (here < best)
        new = (new_scale, new_minimum, here, tried, minimum)
        return tuple(jnp.where(better, a, b) for a, b in zip(new, state, strict=True)), None

    # low_step + step * i as one rounding, the way a fused multiplication and addition has it.
    nudges = [
        np.float32(np.float64(np.float32(step)) * i + np.float64(np.float32(low_step))) + np.float32(top)
        for i in range(steps + 1)
    ]
    start = (scale, low, best, first, low)
    (scale, minimum, _, inverse, origin), _ = lax.scan(attempt, start, jnp.asarray(nudges, jnp.float32))
    return Found(
        jnp.where(flat, np.float32(0), scale),
        jnp.where(flat[None], np.float32(0), codes(inverse, origin)),
        jnp.where(flat, -low, -minimum),
    )
