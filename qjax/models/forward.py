"""The decoder as pure functions of its params.

`forward` may be jitted as a whole; called plainly, it runs one compiled program a kind of layer (layers of the same
shapes and types share it), with each layer's cache donated and updated in place. That is how `generate` runs it:
few and small compilations, whatever the depth.

Who needs more than logits (what quantizers are calibrated with) walks the layers as `forward` does: `begin`, then
`layer` by `layer`, with a `Tap` on what the weights are multiplied with.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.kernels import (
    Activations,
    Angles,
    attend,
    qmatmul,
    qmatmuls,
    qtake,
    rms_norm,
    rope,
    rope_angles,
    stored_as,
    swiglu,
)
from qjax.models.cache import KVCache
from qjax.models.config import ModelConfig

Params = dict[str, Any]
Hidden = Float[Array, "batch seq hidden"]
Positions = Int[Array, "batch seq"]
LayerCache = tuple[Any, Any] | None
# tap(names, x) is given the input x [batch, seq, in] that the weights of these names share, and gives what to keep
# of it: any pytree, None for nothing. It is compiled into the layer: pure, and one and the same function in each call.
Tap = Callable[[tuple[str, ...], Any], Any]
Tapped = dict[tuple[str, ...], Any]


def project(x: Hidden, p: Params, names: tuple[str, ...], activations: Activations) -> list[Any]:
    """Products of x with the weights of these names, each with its bias if it has one."""
    return with_biases(qmatmuls(x, [p[name] for name in names], activations=activations), p, names)


def with_biases(products: Sequence[Any], p: Params, names: Sequence[str]) -> list[Any]:
    """Products with the weights of these names, each with its bias added if it has one."""
    biases = [p.get(f"{name}_bias") for name in names]
    return [
        y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, -1)
        for y, bias in zip(products, biases, strict=True)
    ]


def _store(cache: Any, new: Float[Array, "batch seq kv_heads dim"], positions: Positions) -> Any:
    """Write new entries at their positions; the caller has room for them."""
    rows = jnp.arange(new.shape[0], dtype=positions.dtype)[:, None]

    def write(held: Any, block: Any) -> Any:
        if block.shape[0] == 1:
            return lax.dynamic_update_slice_in_dim(held, jnp.swapaxes(block, 1, 2), positions[0, 0], axis=2)
        return held.at[rows, :, positions].set(block, mode="drop")

    return jax.tree.map(write, cache, stored_as(new, cache))


def attention(
    p: Params,
    x: Hidden,
    angles: Angles,
    positions: Positions,
    cache: LayerCache,
    *,
    config: ModelConfig,
    products: Callable[..., list[Any]],
) -> tuple[Hidden, LayerCache]:
    """The first half of `layer_body`."""
    batch, seq, _ = x.shape
    h = rms_norm(x, p["attn_norm"], config.norm_eps)
    q, k, v = products(h, "attn_q", "attn_k", "attn_v")
    q = q.reshape(batch, seq, config.heads, config.head_dim)
    k = k.reshape(batch, seq, config.kv_heads, config.head_dim)
    v = v.reshape(batch, seq, config.kv_heads, config.head_dim)
    if config.qk_norm:
        q, k = rms_norm(q, p["attn_q_norm"], config.norm_eps), rms_norm(k, p["attn_k_norm"], config.norm_eps)
    q, k = (rope(heads, angles, interleaved=config.rope_interleaved) for heads in (q, k))
    if cache is None:
        keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    else:
        keys, values = _store(cache[0], k, positions), _store(cache[1], v, positions)
        cache = (keys, values)
    a = attend(q, keys, values, positions, config.window).reshape(batch, seq, config.heads * config.head_dim)
    return x + products(a, "attn_output")[0], cache


def feed_forward(p: Params, x: Hidden, *, config: ModelConfig, products: Callable[..., list[Any]]) -> Hidden:
    """The second half of `layer_body`."""
    h = rms_norm(x, p["ffn_norm"], config.norm_eps)
    gate, up = products(h, "ffn_gate", "ffn_up")
    return x + products(swiglu(gate, up), "ffn_down")[0]


def layer_body(
    p: Params,
    x: Hidden,
    angles: Angles,
    positions: Positions,
    cache: LayerCache,
    *,
    config: ModelConfig,
    products: Callable[..., list[Any]],
) -> tuple[Hidden, LayerCache]:
    """One decoder layer: attention and SwiGLU, each on a normed input, each added to x.

    `products(x, *names)` gives the products of x with the weights of these names. Of a layer that is cut over devices
    this is one device's part, and `config` has its heads.
    """
    x, cache = attention(p, x, angles, positions, cache, config=config, products=products)
    return feed_forward(p, x, config=config, products=products), cache


@partial(jax.jit, static_argnames=("config", "activations", "tap"), donate_argnames=("cache",))
def layer(
    p: Params,
    x: Hidden,
    angles: Angles,
    positions: Positions,
    cache: LayerCache,
    *,
    config: ModelConfig,
    activations: Activations = "float",
    tap: Tap | None = None,
) -> tuple[Hidden, LayerCache, Tapped]:
    """`layer_body` of whole weights.

    Returns:
      x, the cache, and of each input of a product what `tap` keeps of it, by the names of the weights: those of p.
    """
    tapped: Tapped = {}

    def products(x: Hidden, *names: str) -> list[Any]:
        if tap is not None:
            tapped[names] = tap(names, x)
        return project(x, p, names, activations)

    return *layer_body(p, x, angles, positions, cache, config=config, products=products), tapped


@jax.jit
def embed(params: Params, tokens: Int[Array, "batch seq"]) -> Hidden:
    """float32 embeddings of tokens."""
    return qtake(params["token_embd"], tokens)


def turns(params: Params, seq: int, start: Int[Array, " batch"]) -> tuple[Angles, Positions]:
    """Rotary angles and positions of `seq` tokens a row whose first ones stand at positions `start`."""
    positions = start[:, None] + jnp.arange(seq, dtype=jnp.int32)[None]
    return rope_angles(positions, params["rope"]), positions


def begin(
    params: Params, tokens: Int[Array, "batch seq"], start: Int[Array, " batch"]
) -> tuple[Hidden, Angles, Positions]:
    """What the first layer is given of tokens whose first ones stand at positions `start`."""
    return embed({"token_embd": params["token_embd"]}, tokens), *turns(params, tokens.shape[1], start)


@partial(jax.jit, static_argnames=("config", "activations"))
def head(
    params: Params,
    x: Hidden,
    at: Int[Array, "batch n"] | None,
    *,
    config: ModelConfig,
    activations: Activations,
) -> Float[Array, "batch n vocab"]:
    """Logits of all positions, or of positions `at[b]` of each row b only."""
    x = before_head(params, x, at, config=config)
    # Tied embeddings: the packed array serves both ends.
    return qmatmul(x, params.get("output", params.get("token_embd")), activations=activations)


def before_head(params: Params, x: Hidden, at: Int[Array, "batch n"] | None, *, config: ModelConfig) -> Any:
    """What the output matrix is multiplied with, of positions `at` only if these are given."""
    if at is not None:
        x = jnp.take_along_axis(x, at[:, :, None], axis=1)
    return rms_norm(x, params["output_norm"], config.norm_eps)


class Programs(NamedTuple):
    """The three programs that a model is made of: called as `embed`, `layer` and `head` are."""

    embed: Callable[..., Any]
    layer: Callable[..., Any]
    head: Callable[..., Any]


WHOLE = Programs(embed, layer, head)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "batch seq"],
    cache: KVCache | None = None,
    *,
    counts: Int[Array, " batch"] | None = None,
    logits_at: Int[Array, "batch n"] | None = None,
    activations: Activations = "float",
) -> tuple[Float[Array, "batch n vocab"], KVCache | None]:
    """Next-token logits of tokens that follow what the cache holds.

    Args:
      params: {"token_embd", "output_norm", "rope", "layers": [...], "output" unless tied}, weights packed or float.
      tokens: one chunk of each row; a row's real tokens come first, anything may follow them.
      cache: what was seen before; None starts anew and keeps nothing. Its arrays are donated: use the one returned.
        Room for all of `tokens`, padding included, must be left in it.
      counts: how many of a row's tokens are real (all, if None): the cache grows by these.
      logits_at: compute the logits of these positions (within `tokens`) only.
      activations: "int8" rounds activations before each matmul.

    Returns:
      float32 logits [batch, seq (or n of logits_at), vocab], and the cache.
    """
    return run_part(
        params, config, tokens, cache, counts=counts, logits_at=logits_at, activations=activations, ends=(True, True)
    )


def run_part(
    params: Params,
    config: ModelConfig,
    x: Int[Array, "batch seq"] | Hidden,
    cache: KVCache | None,
    *,
    ends: tuple[bool, bool],
    counts: Int[Array, " batch"] | None = None,
    logits_at: Int[Array, "batch n"] | None = None,
    activations: Activations = "float",
    programs: Programs = WHOLE,
) -> tuple[Any, KVCache | None]:
    """`forward` of consecutive layers, with the embedding and the head or without.

    Args:
      params: {"rope", "layers"}, and of the ends that this part has what `forward` is given of them.
      x: tokens of the first part, else what the part before returned.
      cache: of these layers.
      ends: whether this is the model's first part, and whether it is its last.
      programs: what is called in place of `embed`, `layer` and `head` where weights are cut over devices.

    Returns:
      logits of the last part, else float32 hidden states [batch, seq, hidden]; and the cache.
    """
    batch, seq = x.shape[:2]
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    angles, positions = turns(params, seq, start)
    if ends[0]:
        x = programs.embed({"token_embd": params["token_embd"]}, x)
    keys, values = [], []
    for i, p in enumerate(params["layers"]):
        held = None if cache is None else (cache.keys[i], cache.values[i])
        x, held, *_ = programs.layer(p, x, angles, positions, held, config=config, activations=activations)
        if held is not None:
            keys.append(held[0])
            values.append(held[1])
    if ends[1]:
        mine = {name: params[name] for name in ("token_embd", "output", "output_norm") if name in params}
        x = programs.head(mine, x, logits_at, config=config, activations=activations)
    if cache is not None:
        grown = start + (jnp.full(batch, seq, jnp.int32) if counts is None else counts.astype(jnp.int32))
        cache = KVCache(tuple(keys), tuple(values), grown)
    return x, cache
