"""Sampling strategies: small frozen dataclasses, each a pure function on logits; chained in llama.cpp's order."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qjax.errors import QjaxError

Logits = Float[Array, "batch vocab"]
Seen = Bool[Array, "batch vocab"]
# One a row: what a row draws does not depend on the others.
Keys = Any
# beartype takes no int for a float.
Number = float | int

# The least float32 that XLA does not flush to zero.
SMALLEST = float(np.finfo(np.float32).tiny)


@runtime_checkable
class Strategy(Protocol):
    """Changes logits [batch, vocab]; -inf rules a token out. `seen` marks the tokens of prompt and output so far."""

    def __call__(self, logits: Logits, seen: Seen) -> Logits: ...


def _check(good: bool, what: str, value: Number) -> None:
    if not good:
        raise QjaxError(f"expected {what}, got {value}")


def _keep(logits: Logits, mask: Bool[Array, "batch vocab"]) -> Logits:
    return jnp.where(mask, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019, arXiv:1909.05858)."""

    penalty: Number

    def __post_init__(self) -> None:
        _check(1e-6 <= self.penalty <= 1e6, "a repetition penalty from 1e-6 to 1e6", self.penalty)

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keep the k most likely tokens (and those that tie with the last of them)."""

    k: int

    def __post_init__(self) -> None:
        _check(self.k >= 1, "top-k of at least 1", self.k)

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        least = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return _keep(logits, logits >= least)


@dataclasses.dataclass(frozen=True)
class TopP:
    """Keep the fewest most likely tokens whose probabilities sum to p (Holtzman et al. 2019, arXiv:1904.09751)."""

    p: Number

    def __post_init__(self) -> None:
        _check(0 < self.p <= 1, "top-p in (0, 1]", self.p)

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the more likely ones do not reach p without it; the first always stays.
        # Rounded sums must neither cut what p = 1 keeps nor drop the first where p rounds to 0.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < self.p, ordered, ordered[:, :1]), axis=-1, keepdims=True)
        return logits if self.p == 1 else _keep(logits, logits >= least)


@dataclasses.dataclass(frozen=True)
class MinP:
    """Keep tokens at least p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082)."""

    p: Number

    def __post_init__(self) -> None:
        _check(0 <= self.p <= 1, "min-p in [0, 1]", self.p)

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        if self.p == 0:
            return logits
        return _keep(logits, logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(self.p)))


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divide logits by the temperature: below 1 is bolder, above 1 more varied."""

    temperature: Number

    def __post_init__(self) -> None:
        _check(0 < self.temperature < math.inf, "a temperature above 0 (0 means greedy)", self.temperature)

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        # Only differences count. The largest becomes 0, which no small temperature makes infinite.
        return (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(self.temperature, SMALLEST)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Always the most likely token."""

    strategies: tuple[Strategy, ...] = ()

    def __call__(self, logits: Logits, seen: Seen, keys: Keys) -> Int[Array, " batch"]:
        for strategy in self.strategies:
            logits = strategy(logits, seen)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw from what the strategies, applied in order, leave."""

    strategies: tuple[Strategy, ...] = ()

    def __call__(self, logits: Logits, seen: Seen, keys: Keys) -> Int[Array, " batch"]:
        for strategy in self.strategies:
            logits = strategy(logits, seen)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


Sampler = Greedy | Sample


def make_sampler(
    *,
    temperature: Number = 0.8,
    top_k: int | None = None,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    repetition_penalty: Number = 1.0,
) -> Sampler:
    """A sampler from the usual numbers: penalty, top-k, top-p, min-p, temperature, in this order.

    Raises:
      QjaxError: a number out of its range.
    """
    penalty: list[Strategy] = [] if repetition_penalty == 1 else [RepetitionPenalty(repetition_penalty)]
    # All are made, and so checked, before greedy leaves out what could not change its choice.
    chain = list(penalty)
    if top_k is not None and top_k != 0:
        chain.append(TopK(top_k))
    if top_p != 1:
        chain.append(TopP(top_p))
    if min_p != 0:
        chain.append(MinP(min_p))
    if temperature == 0:
        return Greedy(tuple(penalty))
    if temperature != 1:
        chain.append(Temperature(temperature))
    return Sample(tuple(chain))
