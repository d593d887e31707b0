"""Attention over a cache by the C++ kernel: float32, one pass over the slots that a query sees."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.kernels.native.call import native_function
from qjax.kernels.native.library import ATTENTION_TARGET, available

_CACHE_DTYPES = ("float16", "bfloat16", "float32", "int8")


def serves_attention(q: Any, k: Any, v: Any) -> bool:
    """Whether the C++ kernel knows these heads and this cache, and is there."""
    known = str(k.dtype) in _CACHE_DTYPES and k.dtype == v.dtype and q.dtype == jnp.float32
    return known and q.shape[-1] % 16 == 0 and 0 not in (*q.shape, *k.shape) and available()


def attention_native(
    q: Float[Array, "batch seq heads dim"],
    k: Any,
    v: Any,
    positions: Int[Array, "batch seq"],
    *,
    window: int | None,
    elsewhere: Callable[..., Any],
) -> Float[Array, "batch seq heads dim"]:
    """Attention of queries at `positions` over k and v [batch, kv_heads, slots, dim], floats or `Int8Slots`.

    Differentiable as `elsewhere` is, which serves the other platforms.
    """
    attributes = (("window", np.int64(window or 0)),)
    return native_function(ATTENTION_TARGET, elsewhere, attributes)(q, k, v, positions.astype(jnp.int32))
