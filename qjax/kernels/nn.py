"""The small operations around the matmuls: RMS norm, SwiGLU's gate, rotary embedding, attention over a cache."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qjax.kernels.native import (
    attention_native,
    rms_norm_native,
    rope_native,
    serves_attention,
    serves_elementwise,
    swiglu_native,
)
from qjax.kernels.slots import Int8Slots, entries


def rms_norm(x: Float[Array, "*batch n"], weight: Float[Array, " n"], eps: float) -> Float[Array, "*batch n"]:
    """x / sqrt(mean(x**2) + eps) * weight, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    by_xla = _rms_norm(eps)
    if not serves_elementwise(x):
        return by_xla(x, weight)
    return rms_norm_native(x, weight.astype(jnp.float32), eps, by_xla)


@functools.cache
def _rms_norm(eps: float) -> Callable[..., Any]:
    def norm(x: Any, weight: Any) -> Any:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(eps))
        # Broadcast by hand: the weight has one axis, x has several.
        w = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)
        return (wide * scale * w).astype(x.dtype)

    return norm


def swiglu(gate: Float[Array, "*batch n"], up: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    return swiglu_native(gate, up, _swiglu) if serves_elementwise(gate, up) else _swiglu(gate, up)


def _swiglu(gate: Any, up: Any) -> Any:
    return jax.nn.silu(gate) * up


Angles = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]


@jax.jit
def rope_angles(positions: Int[Array, "batch seq"], inverse_frequencies: Float[Array, " half"]) -> Angles:
    """Cosine and sine of the angles by which `rope` turns: the same for all heads and layers.

    Args:
      inverse_frequencies: one a rotated pair, theta**(-2i/dim) before any scaling.
    """
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies.reshape(1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: Float[Array, "batch seq heads dim"], angles: Angles, *, interleaved: bool) -> Any:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
      angles: as `rope_angles` gives them. Dimensions past twice their number are passed through.
      interleaved: pairs are (2i, 2i+1), as ggml stores Llama; else (i, i + half), as Qwen.
    """
    by_xla = _ROPES[interleaved]
    if not serves_elementwise(x, *angles):
        return by_xla(x, *angles)
    return rope_native(x, *angles, interleaved=interleaved, elsewhere=by_xla)


def _rope(x: Any, cosine: Any, sine: Any, *, interleaved: bool) -> Any:
    half = cosine.shape[-1]
    cos, sin = cosine[:, :, None], sine[:, :, None]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        pairs = turned.reshape(*turned.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


# One function for each kind: what is compiled for it is found again.
_ROPES = {interleaved: partial(_rope, interleaved=interleaved) for interleaved in (False, True)}


def attention_mask(
    query_positions: Int[Array, "batch seq"], slots: int, window: int | None
) -> Bool[Array, "batch seq slots"]:
    """Slot j holds position j: a query sees the slots up to its own position, and `window` of them at most."""
    slot = jnp.arange(slots, dtype=jnp.int32).reshape(1, 1, slots)
    query = query_positions[..., None]
    seen = slot <= query
    return seen if window is None else seen & (slot > query - window)


# Keys or values [batch, kv_heads, slots, dim]: floats, or int8 with scales.
Entries = Float[Array, "batch kv_heads slots dim"] | Int8Slots


def attention(
    q: Float[Array, "batch seq heads dim"],
    k: Entries,
    v: Entries,
    mask: Bool[Array, "batch seq slots"],
) -> Float[Array, "batch seq heads dim"]:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) in float32; heads share kv_heads in order."""
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # [batch, kv_heads, group * seq, dim]: one dot for each kv head.
    grouped = q.reshape(batch, seq, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, group * seq, dim).astype(jnp.float32)
    precision: Any = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bkqd,bksd->bkqs", grouped, entries(k), precision=precision)
    scores = scores.reshape(batch, kv_heads, group, seq, -1) * jnp.float32(dim**-0.5)
    scores = jnp.where(mask[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, kv_heads, group * seq, -1)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, entries(v), precision=precision)
    out = out.reshape(batch, kv_heads, group, seq, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, seq, heads, dim).astype(q.dtype)


@functools.cache
def _attention_by_dots(window: int | None) -> Callable[..., Any]:
    """`attention` of queries at positions: one function for each window."""
    return lambda q, k, v, positions: attention(q, k, v, attention_mask(positions, k.shape[2], window))


def attend(
    q: Float[Array, "batch seq heads dim"],
    k: Entries,
    v: Entries,
    positions: Int[Array, "batch seq"],
    window: int | None,
) -> Float[Array, "batch seq heads dim"]:
    """`attention` of queries at `positions` over the slots that they see, by the native kernel where it serves."""
    dots = _attention_by_dots(window)
    if not serves_attention(q, k, v):
        return dots(q, k, v, positions)
    return attention_native(q, k, v, positions, window=window, elsewhere=dots)
