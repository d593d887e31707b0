"""Prefill and decode loops over a model on some devices.

Prompts go through the model in chunks of two fixed sizes, padded at the end, so that any prompt needs at most three
compiled programs a kind of layer (large chunk, small chunk, one token).

The cache starts with room for the prompt and a few new tokens and doubles when it is full: attention reads every slot,
so that a step's time and memory follow what was written so far, not what may be.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import QjaxError
from qjax.generate.sampling import Greedy, Sampler
from qjax.models import ModelConfig
from qjax.models.slots import chunk_sizes, slots_for, slots_with_room
from qjax.pipeline import Executor, choose

# New tokens that the cache of `generate_ids` has room for at the start.
NEW_SLOTS = 256
_NO_TOKENS = "a prompt has no tokens: give at least one (or let the model add its BOS)"


def with_room(model: Executor, cache: Any, length: int) -> Any:
    """The cache itself, or a larger one if `length` positions fill it."""
    slots = slots_with_room(model.slots(cache), length, model.config.context)
    return cache if slots == model.slots(cache) else model.grow(cache, slots)


def prefill(model: Executor, prompts: Sequence[Sequence[int]], cache: Any) -> tuple[Float[Array, "batch vocab"], Any]:
    """Run prompts, of unequal lengths if need be, and give the logits after each one's last token, and the cache.

    Raises:
      QjaxError: an empty prompt.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise QjaxError(_NO_TOKENS)
    sizes = chunk_sizes(int(lengths.max()))
    tokens = np.zeros((len(prompts), sum(sizes)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    last, start = None, 0
    for size in sizes:
        counts = jnp.asarray(np.clip(lengths - start, 0, size))
        at = jnp.maximum(counts - 1, 0)[:, None]
        chunk = jnp.asarray(tokens[:, start : start + size])
        logits, cache = model.forward(chunk, cache, counts=counts, logits_at=at)
        last = logits[:, 0] if last is None else jnp.where(model.home(counts > 0)[:, None], logits[:, 0], last)
        start += size
    assert last is not None
    return last, cache


def check_prompt(config: ModelConfig, prompt: Sequence[int], max_tokens: int) -> None:
    """A prompt that the model can be given, with room for what is to follow.

    Raises:
      QjaxError: it is empty, has ids that are not in the vocabulary, or there is no room.
    """
    if not len(prompt):
        raise QjaxError(_NO_TOKENS)
    room = config.context - len(prompt)
    if max_tokens > room:
        way_out = f"ask for at most {room} (max_tokens, -n {room}), or give a shorter prompt"
        raise QjaxError(
            f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the context of {config.context}: "
            + (way_out if room > 0 else "give a shorter prompt")
        )
    if any(not 0 <= token < config.vocab for token in prompt):
        raise QjaxError(f"a token id is not in the model's vocabulary of {config.vocab}")


def row_keys(seed: int, rows: np.ndarray) -> Any:
    """Random keys of rows of these numbers, those of the seeds `seed` + row: no row's draws depend on the others."""
    seeds = (seed + rows.astype(np.uint64)) % np.uint64(1 << 32)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds.astype(np.uint32)))


def first_tokens(
    model: Executor,
    logits: Float[Array, "batch vocab"],
    prompts: Sequence[Sequence[int]],
    keys: Any,
    *,
    sampler: Sampler,
) -> tuple[Any, Any, Any]:
    """The tokens that follow prompts whose last logits these are, the tokens seen with them, and the next keys."""
    mask = np.zeros(logits.shape, bool)
    for row, prompt in zip(mask, prompts, strict=True):
        row[np.asarray(prompt)] = True
    seen, keys = model.home((jnp.asarray(mask), keys))
    return choose(logits, seen, keys, sampler=sampler)


def decode(
    model: Executor,
    logits: Float[Array, "batch vocab"],
    cache: Any,
    *,
    prompts: Sequence[Sequence[int]],
    steps: int,
    sampler: Sampler,
    keys: Any = None,
) -> Iterator[np.ndarray]:
    """Up to `steps` tokens of each row, as int32 [batch] arrays, one step at a time.

    The next step is under way before a token is handed out, so that reading it does not make the device wait. A cache
    that is full grows. `keys` are `row_keys`, of seed 0 if None.
    """
    keys = row_keys(0, np.arange(len(prompts))) if keys is None else keys
    token, seen, keys = first_tokens(model, logits, prompts, keys, sampler=sampler)
    # Counted here, since reading it from the device would wait for each step.
    longest = int(model.lengths(cache).max())
    for step in range(steps):
        now = token
        if step + 1 < steps:
            cache = with_room(model, cache, longest)
            token, seen, keys, cache = model.advance(token, cache, seen, keys, sampler=sampler)
            longest += 1
        yield np.asarray(now)


def row_groups(rows: int, microbatches: int) -> list[slice]:
    """Rows in groups of nearly one size, no more than there are rows."""
    count = max(min(rows, microbatches), 1)
    return [slice(i * rows // count, (i + 1) * rows // count) for i in range(count)]


def generate_ids(
    model: Executor,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    cache_dtype: Any = jnp.float16,
    microbatches: int | None = None,
) -> Iterator[np.ndarray]:
    """Tokens that follow the prompts, int32 [batch] a step, for `max_tokens` steps; the caller stops at will.

    Rows are cut into as many groups as keep all stages of the model busy, or into `microbatches`. A row's tokens do not
    depend on the others.

    Raises:
      QjaxError: an empty prompt, a token id that is not in the vocabulary, more tokens than the model's context, or a
        seed that is not 0 to 2**32 - 1.
    """
    config = model.config
    if not 0 <= seed < 1 << 32:
        raise QjaxError(f"expected a seed from 0 to {(1 << 32) - 1}, got {seed}")
    longest = max((len(prompt) for prompt in prompts), default=0)
    for prompt in prompts:
        check_prompt(config, prompt, max_tokens)
    keys, slots = row_keys(seed, np.arange(len(prompts))), slots_for(longest, min(max_tokens, NEW_SLOTS))
    runs = []
    for rows in row_groups(len(prompts), microbatches or model.microbatches):
        mine = prompts[rows]
        logits, cache = prefill(model, mine, model.init_cache(len(mine), slots, cache_dtype))
        options = {"steps": max_tokens, "sampler": sampler or Greedy(), "keys": keys[rows]}
        runs.append(decode(model, logits, cache, prompts=mine, **options))
    for rows in zip(*runs, strict=True):
        yield np.concatenate(rows)
