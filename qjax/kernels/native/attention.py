"""Attention over a cache by the C++ kernel: float32, one pass over the slots that a query sees."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.kernels.native.library import ATTENTION_TARGET, available, isa_number

_CACHE_DTYPES = ("float16", "bfloat16", "float32")


def serves_attention(q: Any, k: Any, v: Any) -> bool:
    """Whether the C++ kernel knows these heads and this cache, and is there."""
    known = str(k.dtype) in _CACHE_DTYPES and k.dtype == v.dtype and q.dtype == jnp.float32
    return known and q.shape[-1] % 16 == 0 and 0 not in (*q.shape, *k.shape) and available()


def attention_native(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch kv_heads slots dim"],
    v: Float[Array, "batch kv_heads slots dim"],
    positions: Int[Array, "batch seq"],
    *,
    window: int | None,
    elsewhere: Callable[..., Any],
) -> Float[Array, "batch seq heads dim"]:
    """Attention of queries at `positions`; differentiable as `elsewhere` is, which serves the other platforms."""
    return _attention(window, elsewhere)(q, k, v, positions)


@functools.cache
def _attention(window: int | None, elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    @jax.custom_jvp
    def attend(q: Any, k: Any, v: Any, positions: Any) -> Any:
        return lax.platform_dependent(q, k, v, positions, cpu=partial(_call, window=window or 0), default=elsewhere)

    @attend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return attend(*primals), jax.jvp(elsewhere, primals, tangents)[1]

    return attend


def _call(q: Any, k: Any, v: Any, positions: Any, *, window: int) -> Any:
    call = jax.ffi.ffi_call(ATTENTION_TARGET, jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential")
    return call(q, k, v, positions.astype(jnp.int32), window=np.int64(window), isa=np.int64(isa_number()))
