"""Stages, one after the other, as one model: what the loops of `qjax.generate` drive.

Nothing here waits for a device: a stage's program is under way while the next one's is being dispatched, so that
several groups of rows (microbatches), each with a cache of its own, keep several stages busy.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qjax.kernels import Activations
from qjax.models import KVCache, ModelConfig
from qjax.models.cache import grow_cache, insert_row
from qjax.models.forward import Params
from qjax.pipeline.stage import Sampler, Stage, replace_row


@runtime_checkable
class Executor(Protocol):
    """A model on some devices. Caches are its own kind of tree, donated to each call: use the one returned."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def microbatches(self) -> int:
        """Groups of rows that are under way at a time at least, for all devices to be busy."""
        ...

    def init_cache(self, batch: int, slots: int, dtype: Any = jnp.float16) -> Any:
        """An empty cache for `slots` positions of `batch` rows; float16, bfloat16, float32 or int8 entries."""
        ...

    def slots(self, cache: Any) -> int: ...

    def grow(self, cache: Any, slots: int) -> Any:
        """The same cache with room for more positions."""
        ...

    def lengths(self, cache: Any) -> Any:
        """Positions seen of each row, int32 [batch]."""
        ...

    def forward(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Any,
        *,
        counts: Int[Array, " batch"] | None = None,
        logits_at: Int[Array, "batch n"] | None = None,
    ) -> tuple[Float[Array, "batch n vocab"], Any]:
        """See `qjax.forward`."""
        ...

    def advance(
        self, token: Int[Array, " batch"], cache: Any, seen: Bool[Array, "batch vocab"], keys: Any, *, sampler: Sampler
    ) -> tuple[Int[Array, " batch"], Bool[Array, "batch vocab"], Any, Any]:
        """One step: the token that follows each row's, the tokens seen with it, the next keys, and the cache."""
        ...

    def home(self, x: Any) -> Any:
        """x on the device that logits come from."""
        ...

    def insert(self, cache: Any, row: int, other: Any) -> Any:
        """The cache with the only row of another one, which has no more slots, in place of one of its rows."""
        ...

    def replace(self, state: tuple[Any, Any, Any], row: int, other: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Token, seen and keys of `advance` with those of a single row in place of one of their rows."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """An `Executor` of stages on devices of this process, of any kinds; groups: `microbatches`, None: one a device."""

    stages: tuple[Stage, ...]
    groups: int | None = None

    @property
    def config(self) -> ModelConfig:
        return self.stages[0].config

    @property
    def microbatches(self) -> int:
        return self.groups or len({str(stage.where) for stage in self.stages})

    def init_cache(self, batch: int, slots: int, dtype: Any = jnp.float16) -> tuple[KVCache, ...]:
        return tuple(stage.init_cache(batch, slots, dtype) for stage in self.stages)

    def slots(self, cache: tuple[KVCache, ...]) -> int:
        return next(part.slots for part in cache if part.keys)

    def grow(self, cache: tuple[KVCache, ...], slots: int) -> tuple[KVCache, ...]:
        return tuple(grow_cache(part, slots) if part.keys else part for part in cache)

    def lengths(self, cache: tuple[KVCache, ...]) -> Int[Array, " batch"]:
        return cache[0].length

    def forward(
        self,
        tokens: Int[Array, "batch seq"],
        cache: tuple[KVCache, ...],
        *,
        counts: Int[Array, " batch"] | None = None,
        logits_at: Int[Array, "batch n"] | None = None,
    ) -> tuple[Float[Array, "batch n vocab"], tuple[KVCache, ...]]:
        x, held = tokens, []
        for stage, part in zip(self.stages, cache, strict=True):
            x, part = stage.run(x, part, counts=counts, logits_at=logits_at)
            assert part is not None
            held.append(part)
        return x, tuple(held)

    def advance(
        self,
        token: Int[Array, " batch"],
        cache: tuple[KVCache, ...],
        seen: Bool[Array, "batch vocab"],
        keys: Any,
        *,
        sampler: Sampler,
    ) -> tuple[Int[Array, " batch"], Bool[Array, "batch vocab"], Any, tuple[KVCache, ...]]:
        x, held = token, []
        for stage, part in zip(self.stages[:-1], cache, strict=False):
            x, part = stage.step(x, part)
            held.append(part)
        token, seen, keys, part = self.stages[-1].last_step(x, cache[-1], seen, keys, sampler=sampler)
        return token, seen, keys, (*held, part)

    def home(self, x: Any) -> Any:
        return self.stages[-1].put(x)

    def insert(self, cache: tuple[KVCache, ...], row: int, other: tuple[KVCache, ...]) -> tuple[KVCache, ...]:
        return tuple(insert_row(a, row, b) for a, b in zip(cache, other, strict=True))

    def replace(self, state: tuple[Any, Any, Any], row: int, other: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        return replace_row(state, row, other)


def one_stage(params: Params, config: ModelConfig, activations: Activations = "float") -> Pipeline:
    """The executor of a model whose params live on one device."""
    return Pipeline((Stage(params, config, activations=activations),))
