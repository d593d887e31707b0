"""High effort: blocks of least weighted squared error, of the numbers that a reader gets in the end.

ggml's encoders find the scale (and minimum) of each group first, and then round these to integers under a float16
without a look at what this costs. Here float16s and integers are tried together, each time with the best codes:

1. a wider search for what each group would have by itself;
2. a grid of float16 scales and minimums, with the best integers for each group under them;
3. least squares for the float16s, integers and codes as they are, and the best integers for these, in turn.

The search starts from ggml's own block, which only one of a smaller error replaces: none ends with a larger one.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8

from qjax.arrays.floats import f16_to_f32
from qjax.arrays.two_level import PACKINGS
from qjax.quantizers import ggml_search as search
from qjax.quantizers.ggml_blocks import (
    BlockForm,
    Blocks,
    Parts,
    Prepared,
    Super,
    as_bytes,
    by_block,
    by_group,
    half,
    importance_weights,
    padded,
)
from qjax.quantizers.ggml_search import PerGroup, divided, inverse, total

_F = np.float32


class Wanted(NamedTuple):
    """What groups would have by themselves: w ~ scale * code - minimum."""

    scale: Parts
    minimum: Parts | None


class Solution(NamedTuple):
    """Blocks but for their codes, which follow; all the numbers are float32.

    w ~ scale * sub_scale * code - minimum * sub_minimum, `error` being the weighted sum of squared differences; None is
    what a type does not have.
    """

    scale: PerGroup
    sub_scale: Parts | None
    minimum: PerGroup | None
    sub_minimum: Parts | None
    error: PerGroup

    def groups(self) -> Wanted:
        """Scale and minimum of each group."""
        if self.sub_scale is None:
            return Wanted(self.scale, self.minimum)
        scale = self.scale[None] * self.sub_scale
        if self.minimum is None or self.sub_minimum is None:
            return Wanted(scale, None)
        return Wanted(scale, self.minimum[None] * self.sub_minimum)


def _better(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(new.error < old.error, a, b), new, old)


class _Tried(NamedTuple):
    sub_scale: Parts
    sub_minimum: Parts | None
    error: Parts


class High(NamedTuple):
    """A type's blocks and where to search.

    group: numbers that share a scale. low, top: codes; what is stored is `zero` higher. table: codes are indices into
    IQ4's values. magnitude: errors of larger weights count more, see `encode`.
    integers: lowest and highest of the groups' scales, None where the float16 itself is the scale; packing: of these,
    in PACKINGS.
    ratios: first and last inverse scale of a group that is tried, as a share of that which its largest magnitude
    suggests. scales, minimums: first, last and number of the float16s that are tried, as shares of those that make the
    largest group's integer the highest.
    """

    group: int
    low: int
    top: int
    zero: int
    magnitude: bool = False
    table: bool = False
    has_minimum: bool = False
    ratios: tuple[float, float] = (0.9, 1.05)
    integers: tuple[int, int] | None = None
    packing: str = ""
    scales: tuple[float, float, int] = (1, 1, 1)
    minimums: tuple[float, float, int] = (1, 1, 1)

    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        """Groups and the weights of their squared errors, see `encode`; no axis of parts where a block is one group."""
        weights = jnp.ones_like(blocks) if importance is None else importance
        if self.magnitude:
            weights = importance_weights(blocks, weights, 2)
        if self.integers is None:
            return Prepared(blocks, weights)
        return padded(by_group(blocks, self.group), by_group(weights, self.group))

    def start(self, form: BlockForm, g: Prepared, packed: UInt8[Array, "nbytes *blocks"]) -> Solution:
        """What blocks hold that are made already."""

        def float16(name: str) -> PerGroup:
            pair = form.read(name, packed).astype(jnp.uint16)
            return f16_to_f32(pair[0] | (pair[1] << np.uint16(8)))

        scale = float16("d")
        minimum = float16("m") if self.has_minimum else None
        if self.integers is None:
            return self._measured(g, Solution(scale, None, None if minimum is None else -minimum, None, scale))
        integers = PACKINGS[self.packing].unpack(jnp.moveaxis(form.read("sub", packed), 0, -1))
        subs = [None if part is None else jnp.moveaxis(part, -1, 0).astype(jnp.float32) for part in integers]
        return self._measured(g, Solution(scale, subs[0], minimum, subs[1], scale))

    def _measured(self, g: Prepared, made: Solution) -> Solution:
        errors = self._errors(g, made.groups())
        return made._replace(error=errors if self.integers is None else jnp.sum(errors, axis=0))

    def _values(self, x: jax.Array, at: Wanted) -> jax.Array:
        """The best codes, as the numbers that they stand for."""
        unit = self._units(x, at)
        return search.iq4_values(unit) if self.table else jnp.clip(jnp.round(unit), _F(self.low), _F(self.top))

    def _units(self, x: jax.Array, at: Wanted) -> jax.Array:
        return (x if at.minimum is None else x + at.minimum[None]) * inverse(at.scale)[None]

    def _errors(self, g: Prepared, at: Wanted) -> Parts:
        read = at.scale[None] * self._values(g.x, at)
        difference = g.x - (read if at.minimum is None else read - at.minimum[None])
        return total(g.weights * difference * difference)

    def _fit(self, g: Prepared, at: Wanted) -> Wanted:
        """Least squares for a group's numbers, the codes as they are."""
        code = self._values(g.x, at)
        weighted = g.weights * code
        xl, l2 = total(weighted * g.x), total(weighted * code)
        if at.minimum is None:
            return Wanted(divided(xl, l2), None)
        l1, w1, x1 = total(weighted), total(g.weights), total(g.weights * g.x)
        determinant = w1 * l2 - l1 * l1
        able = determinant > 0
        scale = jnp.where(able, divided(w1 * xl - x1 * l1, determinant), at.scale)
        minimum = jnp.where(able, divided(l1 * xl - l2 * x1, determinant), at.minimum)
        if self.integers is None:
            return Wanted(scale, minimum)
        return Wanted(jnp.where(minimum < 0, divided(xl, l2), scale), jnp.maximum(minimum, _F(0)))

    def alone(self, g: Prepared) -> Wanted:
        """Step 1."""
        at = self._lines(g) if self.has_minimum else self._scales(g)
        for _ in range(2):
            at = self._fit(g, at)
        return at

    def _lines(self, g: Prepared) -> Wanted:
        first, last = (self.top * (ratio - 1) for ratio in self.ratios)
        steps = 48
        step = (last - first) / steps
        found = search.affine(g.x, g.weights, self.top, low_step=first, step=step, steps=steps)
        return Wanted(found.scale, found.minimum)

    def _scales(self, g: Prepared) -> Wanted:
        size, number = search.largest(g.x)
        number = jnp.where(size < search.TINY, _F(1), number)

        def attempt(state: Any, nudge: Any) -> Any:
            scale, best = state
            code = self._values(g.x, Wanted(number / nudge, None))
            weighted = g.weights * code
            product, square = total(weighted * g.x), total(weighted * code)
            new = divided(product, square)
            better = new * product > best
            return (jnp.where(better, new, scale), jnp.where(better, new * product, best)), None

        edge = search.IQ4_EDGE if self.table else -self.low
        nudges = edge * np.linspace(*self.ratios, 24)
        zero = jnp.zeros_like(number)
        both = jnp.asarray(np.concatenate([nudges, -nudges]), jnp.float32)
        (scale, _), _ = lax.scan(attempt, (zero, zero), both)
        return Wanted(scale, None)

    def _near(self, g: Prepared, scale: PerGroup, minimum: PerGroup | None, wanted: Wanted) -> Solution:
        """The best integers near what the groups want, under these numbers (which become float16)."""
        d = half(scale)[1]
        m = None if minimum is None else half(minimum)[1]
        if self.integers is None:
            return self._measured(g, Solution(d, None, m, None, d))
        low, high = self.integers
        middle = jnp.round(wanted.scale * inverse(d)[None])
        mean_code = divided(total(g.weights * self._values(g.x, wanted)), total(g.weights))

        def attempt(best: _Tried, offset: Any) -> Any:
            sub_scale = jnp.clip(middle + offset, _F(low), _F(high))
            at = Wanted(sub_scale * d[None], None)
            sub_minimum = None
            if m is not None and wanted.minimum is not None:
                # By as much as the mean code times the scale grows.
                follows = wanted.minimum + mean_code * (at.scale - wanted.scale)
                sub_minimum = jnp.clip(jnp.round(follows * inverse(m)[None]), _F(0), _F(high))
                at = Wanted(at.scale, sub_minimum * m[None])
            return _better(_Tried(sub_scale, sub_minimum, self._errors(g, at)), best), None

        none = jnp.zeros_like(middle)
        start = _Tried(none, None if m is None else none, jnp.full_like(middle, jnp.inf))
        best, _ = lax.scan(attempt, start, jnp.arange(-1, 2, dtype=jnp.float32))
        return Solution(d, best.sub_scale, m, best.sub_minimum, jnp.sum(best.error, axis=0))

    def grid(self, g: Prepared, wanted: Wanted, at: Solution) -> Solution:
        """Step 2; `at` is what to start from."""
        if self.integers is None:
            return _better(self._near(g, wanted.scale, wanted.minimum, wanted), at)
        low, high = self.integers
        _, most = search.largest(wanted.scale)
        deepest = None if wanted.minimum is None else jnp.max(wanted.minimum, axis=0)
        edge = _F(low if low < 0 else high)

        def attempt(state: Any, nudge: Any) -> Any:
            m = None if deepest is None else deepest / (_F(high) * nudge[1])
            return _better(self._near(g, most / (edge * nudge[0]), m, wanted), state), None

        nudges = [(a, b) for a in np.linspace(*self.scales) for b in np.linspace(*self.minimums)]
        return lax.scan(attempt, at, jnp.asarray(nudges, jnp.float32))[0]

    def refine(self, g: Prepared, at: Solution) -> Solution:
        """Step 3."""

        def again(_: Any, at: Solution) -> Solution:
            wanted = self._fit(g, at.groups())
            scale, minimum = wanted if at.sub_scale is None else self._fit_block(g, at, at.sub_scale)
            return _better(self._near(g, scale, minimum, wanted), at)

        return lax.fori_loop(0, 4, again, at)

    def _fit_block(self, g: Prepared, at: Solution, s: Parts) -> tuple[PerGroup, PerGroup | None]:
        """Least squares for a block's float16s, integers and codes as they are."""
        m = at.sub_minimum
        code = self._values(g.x, at.groups())
        weighted = g.weights * code
        xl = jnp.sum(s * total(weighted * g.x), axis=0)
        l2 = jnp.sum(s * s * total(weighted * code), axis=0)
        if at.minimum is None or m is None:
            return divided(xl, l2), None
        l1 = jnp.sum(s * m * total(weighted), axis=0)
        w1 = jnp.sum(m * m * total(g.weights), axis=0)
        x1 = jnp.sum(m * total(g.weights * g.x), axis=0)
        determinant = w1 * l2 - l1 * l1
        scale, minimum = divided(w1 * xl - x1 * l1, determinant), divided(l1 * xl - l2 * x1, determinant)
        able = (determinant > _F(1e-6) * w1 * l2) & (minimum >= 0)
        return jnp.where(able, scale, at.scale), jnp.where(able, minimum, at.minimum)

    def finish(self, g: Prepared, at: Solution) -> Super:
        """The codes, and all as it is stored."""
        units = self._units(g.x[: self.group], at.groups())
        if self.table:
            codes = search.iq4_codes(units)
        else:
            codes = jnp.clip(jnp.round(units), _F(self.low), _F(self.top)) + _F(self.zero)
        scale = half(at.scale)[0]
        if at.sub_scale is None:
            minimum = None if at.minimum is None else half(-at.minimum)[0]
            return Super(scale, minimum, None, None, as_bytes(codes))
        minimum = None if at.minimum is None else half(at.minimum)[0]
        sub_minimum = None if at.sub_minimum is None else at.sub_minimum.astype(jnp.int32)
        return Super(scale, minimum, at.sub_scale.astype(jnp.int32), sub_minimum, as_bytes(by_block(codes)))


HIGH: Mapping[str, High] = MappingProxyType(
    {
        "Q2_K": High(
            16,
            0,
            3,
            0,
            magnitude=True,
            has_minimum=True,
            ratios=(0.6, 1.2),
            integers=(0, 15),
            packing="q2_k",
            scales=(0.8, 1.05, 5),
            minimums=(0.8, 1.05, 4),
        ),
        "Q3_K": High(
            16, -4, 3, 4, magnitude=True, ratios=(0.6, 1.3), integers=(-32, 31), packing="q3_k", scales=(0.85, 1.1, 9)
        ),
        "Q4_K": High(
            32,
            0,
            15,
            0,
            has_minimum=True,
            ratios=(0.87, 1.06),
            integers=(0, 63),
            packing="q4_k",
            scales=(0.94, 1.03, 4),
            minimums=(0.94, 1.03, 4),
        ),
        "Q5_K": High(
            32,
            0,
            31,
            0,
            has_minimum=True,
            ratios=(0.85, 1.06),
            integers=(0, 63),
            packing="q4_k",
            scales=(0.94, 1.03, 4),
            minimums=(0.94, 1.03, 4),
        ),
        "Q6_K": High(16, -32, 31, 32, ratios=(0.9, 1.05), integers=(-128, 127), packing="q6_k", scales=(0.9, 1.05, 6)),
        "IQ4_XS": High(
            32, 0, 15, 0, table=True, ratios=(0.8, 1.15), integers=(-32, 31), packing="iq4_xs", scales=(0.75, 1.1, 8)
        ),
        "IQ4_NL": High(32, 0, 15, 0, table=True, ratios=(0.8, 1.15)),
        "Q4_0": High(32, -8, 7, 8, ratios=(0.75, 1.15)),
        "Q4_1": High(32, 0, 15, 0, has_minimum=True, ratios=(0.85, 1.08)),
        "Q5_0": High(32, -16, 15, 16, ratios=(0.85, 1.07)),
        "Q5_1": High(32, 0, 31, 0, has_minimum=True, ratios=(0.85, 1.07)),
        "Q8_0": High(32, -127, 127, 0, ratios=(0.98, 1.01)),
    }
)
