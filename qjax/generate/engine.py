"""Prefill and decode loops over the pure `forward`.

Prompts go through the model in chunks of two fixed sizes, padded at the end, so that any prompt needs at most three
compiled programs a kind of layer (large chunk, small chunk, one token).

The cache starts with room for the prompt and a few new tokens and doubles when it is full: attention reads every slot,
so that a step's time and memory follow what was written so far, not what may be.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qjax.errors import QjaxError
from qjax.generate.sampling import Greedy, Sampler
from qjax.kernels import Activations, native
from qjax.models import KVCache, ModelConfig, forward, init_cache
from qjax.models.slots import chunk_sizes, slots_for, with_room

# New tokens that the cache of `generate_ids` has room for at the start.
NEW_SLOTS = 256

Params = dict[str, Any]


def prefill(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    *,
    activations: Activations = "float",
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Run prompts, of unequal lengths if need be, and give the logits after each one's last token.

    Raises:
      QjaxError: an empty prompt.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise QjaxError("a prompt has no tokens: give at least one (or let the model add its BOS)")
    sizes = chunk_sizes(int(lengths.max()))
    tokens = np.zeros((len(prompts), sum(sizes)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    last, start = None, 0
    for size in sizes:
        counts = jnp.asarray(np.clip(lengths - start, 0, size))
        logits, held = forward(
            params,
            config,
            jnp.asarray(tokens[:, start : start + size]),
            cache,
            counts=counts,
            logits_at=jnp.maximum(counts - 1, 0)[:, None],
            activations=activations,
        )
        assert held is not None
        cache = held
        last = logits[:, 0] if last is None else jnp.where((counts > 0)[:, None], logits[:, 0], last)
        start += size
    assert last is not None
    return last, cache


@partial(jax.jit, static_argnames="sampler")
def choose(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], key: Any, *, sampler: Sampler
) -> tuple[Int[Array, " batch"], Bool[Array, "batch vocab"], Any]:
    """The next token of each row, the tokens seen with it, and the next key."""
    now, later = jax.random.split(key)
    token = sampler(logits, seen, now)
    rows = jnp.arange(token.shape[0], dtype=token.dtype)
    return token, seen.at[rows, token].set(True), later


def decode(
    params: Params,
    config: ModelConfig,
    logits: Float[Array, "batch vocab"],
    cache: KVCache,
    *,
    prompts: Sequence[Sequence[int]],
    steps: int,
    sampler: Sampler,
    seed: int = 0,
    activations: Activations = "float",
) -> Iterator[np.ndarray]:
    """Up to `steps` tokens of each row, as int32 [batch] arrays, one step at a time.

    The next step is under way before a token is handed out, so that reading it does not make the device wait. A cache
    that is full grows.
    """
    mask = np.zeros(logits.shape, bool)
    for row, prompt in zip(mask, prompts, strict=True):
        row[np.asarray(prompt)] = True
    advance = _advance_as_one if _as_one_program() else _advance
    token, seen, key = choose(logits, jnp.asarray(mask), jax.random.key(seed), sampler=sampler)
    # Counted here, since reading it from the device would wait for each step.
    longest = int(cache.length.max())
    for step in range(steps):
        now = token
        if step + 1 < steps:
            cache = with_room(cache, longest, config.context)
            token, seen, key, cache = advance(
                params, config, token, cache, seen, key, sampler=sampler, activations=activations
            )
            longest += 1
        yield np.asarray(now)


def _advance(
    params: Params,
    config: ModelConfig,
    token: Int[Array, " batch"],
    cache: KVCache,
    seen: Bool[Array, "batch vocab"],
    key: Any,
    *,
    sampler: Sampler,
    activations: Activations,
) -> tuple[Int[Array, " batch"], Bool[Array, "batch vocab"], Any, KVCache]:
    """One step: the token that follows, what was seen with it, the next key, and the cache."""
    logits, held = forward(params, config, token[:, None], cache, activations=activations)
    assert held is not None
    return *choose(logits[:, 0], seen, key, sampler=sampler), held


# All of a step as one program: nothing of Python runs between its layers, on a machine whose cores are all busy.
_advance_as_one = jax.jit(
    _advance, static_argnames=("config", "sampler", "activations"), donate_argnames=("cache", "seen")
)


def _as_one_program() -> bool:
    """Whether a step compiles fast as a whole: XLA:CPU's own loops over tiles, seven a layer, do not."""
    return jax.default_backend() != "cpu" or native.available()


def generate_ids(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    cache_dtype: Any = jnp.float16,
    activations: Activations = "float",
) -> Iterator[np.ndarray]:
    """Tokens that follow the prompts, int32 [batch] a step, for `max_tokens` steps; the caller stops at will.

    Raises:
      QjaxError: an empty prompt, a token id that is not in the vocabulary, more tokens than the model's context, or a
        seed that is not 0 to 2**32 - 1.
    """
    if not 0 <= seed < 1 << 32:
        raise QjaxError(f"expected a seed from 0 to {(1 << 32) - 1}, got {seed}")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_tokens > config.context:
        room = config.context - longest
        way_out = f"ask for at most {room} (max_tokens, -n {room}), or give a shorter prompt"
        raise QjaxError(
            f"{longest} prompt tokens and {max_tokens} new ones exceed the model's context of {config.context}: "
            + (way_out if room > 0 else "give a shorter prompt")
        )
    if any(not 0 <= token < config.vocab for prompt in prompts for token in prompt):
        raise QjaxError(f"a token id is not in the model's vocabulary of {config.vocab}")
    cache = init_cache(config, len(prompts), slots_for(longest, min(max_tokens, NEW_SLOTS)), cache_dtype)
    logits, cache = prefill(params, config, prompts, cache, activations=activations)
    yield from decode(
        params,
        config,
        logits,
        cache,
        prompts=prompts,
        steps=max_tokens,
        sampler=sampler or Greedy(),
        seed=seed,
        activations=activations,
    )
