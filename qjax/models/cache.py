"""The KV cache: keys and values of the positions seen so far, one array of each a layer.

      slot   0   1   2   3   4   5 ...            length
    row 0 [ k0  k1  k2  k3   .   . ]                4       a row's next token goes to slot `length`
    row 1 [ k0  k1   .   .   .   . ]                2       and sees the slots before it and its own

Slot j holds position j. What lies at or after `length` is never seen: padding may be written there and is
overwritten by the next tokens.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from qjax.kernels import empty_slots
from qjax.models.config import ModelConfig

# What a cache holds its entries as: 16-bit floats (or wider), or int8 with a scale for each head and token.
CacheKind = Literal["float", "int8"]


@struct.dataclass
class KVCache:
    """Leaves: keys and values, tuples of [batch, kv_heads, slots, head_dim], one a layer; length int32 [batch].

    Those of an int8 cache are `Int8Slots`, codes with a scale for each head and token.
    """

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
    """An empty cache for `slots` positions of `batch` texts; float16, bfloat16, float32 or int8 entries."""
    shape = (batch, config.kv_heads, slots, config.head_dim)
    return KVCache(
        keys=tuple(empty_slots(shape, dtype) for _ in range(config.layers)),
        values=tuple(empty_slots(shape, dtype) for _ in range(config.layers)),
        length=jnp.zeros(batch, jnp.int32),
    )


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same cache with room for `slots` positions, at least as many as it has: the new ones hold zeros."""

    def grown(array: Any) -> Any:
        return jnp.pad(array, [(0, slots - cache.slots if axis == 2 else 0) for axis in range(array.ndim)])

    return KVCache(jax.tree.map(grown, cache.keys), jax.tree.map(grown, cache.values), cache.length)


@partial(jax.jit, donate_argnames="cache")
def insert_row(cache: KVCache, row: Any, other: KVCache) -> KVCache:
    """The cache with the only row of another one, which has no more slots, in place of one of its rows."""

    def put(held: Any, new: Any) -> Any:
        return lax.dynamic_update_slice(held, new.astype(held.dtype), (row, *(0 for _ in held.shape[1:])))

    return KVCache(
        jax.tree.map(put, cache.keys, other.keys),
        jax.tree.map(put, cache.values, other.values),
        cache.length.at[row].set(other.length[0]),
    )
