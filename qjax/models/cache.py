"""The KV cache: keys and values of the positions seen so far, one array of each a layer.

      slot   0   1   2   3   4   5 ...            length
    row 0 [ k0  k1  k2  k3   .   . ]                4       a row's next token goes to slot `length`
    row 1 [ k0  k1   .   .   .   . ]                2       and sees the slots before it and its own

Slot j holds position j. What lies at or after `length` is never seen: padding may be written there and is
overwritten by the next tokens.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct

from qjax.models.config import ModelConfig


@struct.dataclass
class KVCache:
    """Leaves: keys and values, tuples of [batch, kv_heads, slots, head_dim], one a layer; length int32 [batch]."""

    keys: Any
    values: Any
    length: Any

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float16) -> KVCache:
    """An empty cache for `slots` positions of `batch` texts; float16 or bfloat16 (or float32) entries."""
    shape = (batch, config.kv_heads, slots, config.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)),
        length=jnp.zeros(batch, jnp.int32),
    )


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same cache with room for `slots` positions, at least as many as it has: the new ones hold zeros."""
    more = ((0, 0), (0, 0), (0, slots - cache.slots), (0, 0))
    return KVCache(
        keys=tuple(jnp.pad(array, more) for array in cache.keys),
        values=tuple(jnp.pad(array, more) for array in cache.values),
        length=cache.length,
    )
