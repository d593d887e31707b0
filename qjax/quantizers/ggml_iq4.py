"""Encoders of IQ4_NL and IQ4_XS, with and without importance: 4-bit codes into a table of 16 values.

Source: quantize_row_iq4_nl_impl of llama.cpp's ggml/src/ggml-quants.c with 7 tries to each side, as quantize_iq4_nl and
quantize_iq4_xs call it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.quantizers import ggml_search as search
from qjax.quantizers.ggml_blocks import (
    Blocks,
    Prepared,
    Steps,
    Super,
    as_bytes,
    by_block,
    by_group,
    half,
    importance_weights,
)
from qjax.quantizers.ggml_search import Found

_GROUP = 32


class NonLinear(NamedTuple):
    """Groups of 32 with a scale: float16, or (integers) 6 bits under the float16 of a super-block."""

    integers: bool

    def prepare(self, blocks: Blocks, importance: Blocks | None) -> Prepared:
        weights = blocks * blocks if importance is None else importance_weights(blocks, importance, 2)
        # A block of one group has no axis of parts: XLA:CPU's loops are ten times as slow over an axis of one.
        if not self.integers:
            return Prepared(blocks, weights)
        return Prepared(by_group(blocks, _GROUP), by_group(weights, _GROUP))

    def search(self, groups: Prepared, weighted: bool) -> Found:
        return search.non_linear(*groups)

    def finish(self, groups: Prepared, found: Found, weighted: bool) -> Super:
        if not self.integers:
            bits, _ = half(found.scale)
            return Super(bits, None, None, None, as_bytes(found.codes))
        _, most = search.largest(found.scale)
        none = most == 0
        scale = -most / np.float32(32)
        integers = jnp.round(found.scale / jnp.where(none, np.float32(1), scale)[None])
        integers = jnp.clip(integers, np.float32(-32), np.float32(31))
        bits, _ = half(scale)
        codes = by_block(search.iq4_codes(search.inverse(scale[None] * integers)[None] * groups.x))
        return Super(bits, None, integers.astype(jnp.int32), None, as_bytes(codes))


IQ4_TYPES: Mapping[str, Steps] = MappingProxyType(
    {"IQ4_NL": NonLinear(integers=False), "IQ4_XS": NonLinear(integers=True)}
)
