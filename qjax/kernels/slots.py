"""Keys and values of a cache as int8, with a scale for each head and token: half the bytes of 16-bit floats."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32


@struct.dataclass
class Int8Slots:
    """entry = scale * codes, codes from -127 to 127.

    Leaves: codes int8 [batch, kv_heads, slots, dim], scale float32 [batch, kv_heads, slots] (the axes before dim are
    whatever is stored). What differs from an entry of 32-bit floats is at most half a scale, the largest magnitude of
    the head's vector / 254.
    """

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def floats(self) -> Float32[Array, "*lead dim"]:
        """What the entries stand for."""
        return self.codes.astype(jnp.float32) * self.scale[..., None]


def to_slots(x: Float[Array, "*lead dim"]) -> Int8Slots:
    """x rounded to the nearest of 255 steps of each vector; one that is not finite gets NaN for a scale."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None])
    known = scale < jnp.inf
    codes = jnp.where(known[..., None], jnp.clip(codes, -127, 127), 0).astype(jnp.int8)
    return Int8Slots(codes, jnp.where(known, scale, jnp.nan))


def entries(x: Any) -> Float32[Array, "*lead dim"]:
    """float32 of a cache's keys or values, whatever holds them."""
    return x.floats() if isinstance(x, Int8Slots) else x.astype(jnp.float32)


def stored_as(x: Float[Array, "*lead dim"], cache: Any) -> Any:
    """x in the form that a cache holds its entries in."""
    return to_slots(x) if isinstance(cache, Int8Slots) else x.astype(cache.dtype)


def empty_slots(shape: tuple[int, ...], dtype: Any) -> Any:
    """Entries that hold nothing; int8 for ones with scales."""
    if jnp.dtype(dtype) == jnp.int8:
        return Int8Slots(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
    return jnp.zeros(shape, dtype)
