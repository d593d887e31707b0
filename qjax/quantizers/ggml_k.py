"""Encoders of ggml's K-quants, with and without importance: floats to super-blocks of 256.

Source: quantize_row_q2_K_ref ... q6_K_ref (no importance) and quantize_row_q2_K_impl ... (with it) of llama.cpp's
ggml/src/ggml-quants.c; the searches are in `ggml_search`. First each group finds its scale (and minimum), then the
super-block rounds those to integers under one float16 scale, and last all codes are made anew for what these became.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.quantizers import ggml_search as search
from qjax.quantizers.ggml_blocks import (
    Blocks,
    Parts,
    Prepared,
    Steps,
    Super,
    as_bytes,
    by_block,
    by_group,
    half,
    importance_weights,
    padded,
)
from qjax.quantizers.ggml_search import Found, total


def _codes(
    x: Float32[Array, "size parts *blocks"], scale: Parts, minimum: Parts | None, found: Found, low: int, top: int
) -> UInt8[Array, "256 *blocks"]:
    """Codes for the scales that a super-block has in the end; where a scale became 0, those that the search had."""
    none = (scale == 0)[None]
    shifted = x if minimum is None else x + minimum[None]
    code = jnp.round(shifted / jnp.where(none, np.float32(1), scale[None]))
    code = jnp.clip(code, np.float32(low), np.float32(top)) - np.float32(low)
    code = jnp.where(none, found.codes[: x.shape[0]], code)
    return as_bytes(by_block(code))


def _by_largest(parts: Parts, top: int) -> tuple[jax.Array, Parts]:
    """(scale, integers): the largest of a super-block becomes `top`."""
    most = jnp.maximum(jnp.max(parts, axis=0), np.float32(0))
    none = most == 0
    inverse = jnp.where(none, np.float32(0), np.float32(top) / jnp.where(none, np.float32(1), most))
    return most / np.float32(top), jnp.minimum(jnp.round(inverse[None] * parts), np.float32(top))


class Affine(NamedTuple):
    """Q2_K, Q4_K and Q5_K: scale and minimum a group.

    integer: the highest of the groups' integers. steps: of the search without importance. factor: of sigma2.
    mean_weight: weights without importance are |x| and the group's root mean square, not |x| alone.
    """

    size: int
    top: int
    integer: int
    steps: tuple[float, float, int]
    absolute: bool
    factor: int
    mean_weight: bool

    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        x = by_group(blocks, self.size)
        if importance is not None:
            weights = by_group(importance_weights(blocks, importance, self.factor), self.size)
        elif self.mean_weight:
            weights = jnp.sqrt(total(x * x) / np.float32(self.size))[None] + jnp.abs(x)
        else:
            weights = jnp.abs(x)
        return padded(x, weights)

    def search(self, groups: Prepared, weighted: bool) -> Found:
        if weighted:
            return search.affine(*groups, self.top, low_step=-0.9, step=0.05, steps=36)
        low, step, steps = self.steps
        return search.affine(*groups, self.top, low_step=low, step=step, steps=steps, absolute=self.absolute)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        assert found.minimum is not None
        if weighted:
            sums = total(groups.weights)
            scale, integers, _ = search.positive(found.scale, sums, self.integer)
            minimum, low_integers, _ = search.positive(found.minimum, sums, self.integer)
        else:
            scale, integers = _by_largest(found.scale, self.integer)
            minimum, low_integers = _by_largest(found.minimum, self.integer)
        (scale_bits, d), (minimum_bits, m) = half(scale), half(minimum)
        codes = _codes(groups.x[: self.size], d[None] * integers, m[None] * low_integers, found, 0, self.top)
        return Super(scale_bits, minimum_bits, integers.astype(jnp.int32), low_integers.astype(jnp.int32), codes)


class _Symmetric(NamedTuple):
    """Q3_K and Q6_K: groups of 16 with a scale; codes low ... top."""

    low: int
    top: int

    def _x(self, blocks: Blocks) -> Float32[Array, "16 parts *blocks"]:
        return by_group(blocks, 16)


class Q3(_Symmetric):
    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        x = self._x(blocks)
        return Prepared(x, x * x if importance is None else by_group(importance_weights(blocks, importance, 2), 16))

    def search(self, groups: Prepared, weighted: bool) -> Found:
        return search.symmetric(*groups, self.top + 1) if weighted else search.three_bits(groups.x, self.top + 1)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        if weighted:
            scale, codes, _ = search.symmetric(found.scale, total(groups.weights), 32)
            integers = codes - np.float32(32)
        else:
            _, most = search.largest(found.scale)
            none = most == 0
            inverse = np.float32(-32) / jnp.where(none, np.float32(1), most)
            integers = jnp.clip(jnp.round(inverse[None] * found.scale), np.float32(-32), np.float32(31))
            # All bytes are zero then, which stand for -32.
            integers = jnp.where(none[None], np.float32(-32), integers)
            scale = jnp.where(none, np.float32(0), np.float32(1) / inverse)
        scale_bits, d = half(scale)
        codes = _codes(groups.x, d[None] * integers, None, found, self.low, self.top)
        return Super(scale_bits, None, integers.astype(jnp.int32), None, codes)


class Q6(_Symmetric):
    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        x = self._x(blocks)
        return Prepared(x, x * x if importance is None else self._x(jnp.broadcast_to(importance, blocks.shape)))

    def search(self, groups: Prepared, weighted: bool) -> Found:
        return search.symmetric(*groups, self.top + 1)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        size, most = search.largest(found.scale)
        none = size < search.TINY
        inverse = np.float32(-128) / jnp.where(none, np.float32(1), most)
        integers = jnp.minimum(jnp.round(inverse[None] * found.scale), np.float32(127))
        integers = jnp.where(none[None], np.float32(0), integers)
        scale_bits, d = half(jnp.where(none, np.float32(0), np.float32(1) / inverse))
        codes = _codes(groups.x, d[None] * integers, None, found, self.low, self.top)
        return Super(scale_bits, None, integers.astype(jnp.int32), None, jnp.where(none[None], np.uint8(0), codes))


K_TYPES: Mapping[str, Steps] = MappingProxyType(
    {
        "Q2_K": Affine(16, 3, 15, (-0.5, 0.1, 15), absolute=True, factor=1, mean_weight=False),
        "Q3_K": Q3(-4, 3),
        "Q4_K": Affine(32, 15, 63, (-1.0, 0.1, 20), absolute=False, factor=2, mean_weight=True),
        "Q5_K": Affine(32, 31, 63, (-0.5, 0.1, 15), absolute=False, factor=2, mean_weight=True),
        "Q6_K": Q6(-32, 31),
    }
)
