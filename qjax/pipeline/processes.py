"""One model over several processes: each runs one stage, and hidden states go round by a collective.

    tick        t      t+1     t+2     t+3
    stage 0   [ A ]   [ B ]   [ A']   [ B']        A, B: groups of rows; A' is A's next token
    stage 1           [ A ]   [ B ]   [ A']        after each tick: x to the next stage, tokens to all

Every process makes the same calls in the same order, as JAX asks of several processes. A stage is a program of its own,
with as many layers as the plan says: only what travels has to be alike everywhere, so that nothing is padded but the
rows of a smaller group. `shard_map` over the axis "stage" moves x by `ppermute` and shares tokens by `psum`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qjax.models import KVCache, ModelConfig
from qjax.models.cache import grow_cache, insert_row
from qjax.pipeline.stage import Sampler, Stage, replace_row

STAGE = "stage"


@dataclasses.dataclass(eq=False)
class Flight:
    """The tokens of one step of a group of rows: an array once they have come round."""

    cache: KVCache
    entering: Any
    seen: Any
    keys: Any
    sampler: Sampler
    rows: int
    at: int = 0
    token: Any = None
    wait: Any = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.token is None:
            self.wait(self)
        return np.asarray(self.token, dtype)


class ProcessPipeline:
    """An `Executor` of which each process has one stage: that of its number.

    Args:
      stage: this process's.
      process, processes: its number and how many there are. groups: `microbatches`, None for one a process.
    """

    def __init__(self, stage: Stage, process: int, processes: int, groups: int | None = None) -> None:
        self._stage, self._me, self._all = stage, process, processes
        self._groups = groups or processes
        first = {device.process_index: device for device in reversed(jax.devices(stage.platform))}
        self._mesh = Mesh(np.array([first[i] for i in range(processes)]), (STAGE,))
        self._here = first[process]
        self._flights: list[Flight] = []
        self._inbox: Any = None
        self._rows = 1

    @property
    def config(self) -> ModelConfig:
        return self._stage.config

    @property
    def microbatches(self) -> int:
        return self._groups

    def init_cache(self, batch: int, slots: int, dtype: Any = jnp.float16) -> "Held":
        self._rows = max(self._rows, batch)
        return Held(self._stage.init_cache(batch, slots, dtype), slots, np.zeros(batch, np.int32))

    def slots(self, cache: "Held") -> int:
        return cache.slots

    def grow(self, cache: "Held", slots: int) -> "Held":
        held = self._changed(cache, lambda held: grow_cache(held, slots))
        return Held(held, slots, cache.length, cache.flight)

    def lengths(self, cache: "Held") -> Any:
        return cache.length

    def home(self, x: Any) -> Any:
        return self._stage.put(x)

    def insert(self, cache: "Held", row: int, other: "Held") -> "Held":
        held = self._changed(cache, lambda held: insert_row(held, row, other.cache))
        length = cache.length.copy()
        length[row] = other.length[0]
        return Held(held, cache.slots, length, cache.flight)

    def replace(self, state: tuple[Any, Any, Any], row: int, other: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        token, _seen, _keys = state
        if not isinstance(token, Flight):
            return replace_row(state, row, other)
        self._finish(token)
        made, token.seen, token.keys = replace_row((token.token, token.seen, token.keys), row, other)
        token.token = made
        return token, token.seen, token.keys

    def _changed(self, cache: "Held", change: Callable[[KVCache], KVCache]) -> KVCache:
        """What this process holds, changed once no step has it; a stage without layers holds nothing to change."""
        flight = cache.flight
        if flight is not None:
            self._finish(flight)
        held = cache.cache if flight is None else flight.cache
        held = change(held) if held.keys else held
        if flight is not None:
            flight.cache = held
        return held

    def forward(
        self,
        tokens: Int[Array, "batch seq"],
        cache: "Held",
        *,
        counts: Int[Array, " batch"] | None = None,
        logits_at: Int[Array, "batch n"] | None = None,
    ) -> tuple[Float[Array, "batch n vocab"], "Held"]:
        """See `qjax.forward`: one stage after the other; every process is given the logits."""
        batch, seq = tokens.shape
        x, held = tokens, cache.cache
        n = seq if logits_at is None else logits_at.shape[1]
        logits = jnp.zeros((batch, n, self.config.vocab), jnp.float32)
        for turn in range(self._all):
            sent = jnp.zeros((batch, seq, self.config.hidden), jnp.float32)
            if turn == self._me:
                y, part = self._stage.run(x, held, counts=counts, logits_at=logits_at)
                assert part is not None
                held = part
                logits, sent = (y, sent) if self._stage.ends[1] else (logits, y)
            if turn < self._all - 1:
                x = self._exchange(sent, jnp.zeros(1, jnp.int32))[0]
        logits = self._exchange(jnp.zeros((1,), jnp.float32), logits)[1]
        seen = np.full(batch, seq, np.int32) if counts is None else np.asarray(counts, np.int32)
        return self._stage.put(logits), Held(held, cache.slots, cache.length + seen)

    def advance(
        self,
        token: Any,
        cache: "Held",
        seen: Bool[Array, "batch vocab"],
        keys: Any,
        *,
        sampler: Sampler,
    ) -> tuple[Any, Any, Any, "Held"]:
        """One step, which enters the first stage now; its tokens have come round some ticks later."""
        held = cache.cache
        if isinstance(token, Flight):
            self._finish(token)
            token, held, seen, keys = token.token, token.cache, token.seen, token.keys
        flight = Flight(held, token, seen, keys, sampler, len(cache.length), wait=self._finish)
        self._flights.append(flight)
        self._tick()
        return flight, seen, keys, Held(held, cache.slots, cache.length + 1, flight)

    def _finish(self, flight: Flight) -> None:
        while flight.token is None:
            self._tick()

    def _tick(self) -> None:
        """Each stage does what lies before it; then x goes on, and the last stage's tokens to all."""
        x = jnp.zeros((self._rows, 1, self.config.hidden), jnp.float32)
        tokens = jnp.zeros(self._rows, jnp.int32)
        for flight in self._flights:
            if flight.at != self._me:
                continue
            given = flight.entering if self._stage.ends[0] else self._inbox[: flight.rows]
            if self._stage.ends[1]:
                made, flight.seen, flight.keys, flight.cache = self._stage.last_step(
                    given, flight.cache, flight.seen, flight.keys, sampler=flight.sampler
                )
                tokens = jnp.pad(made, (0, self._rows - flight.rows))
            else:
                made, flight.cache = self._stage.step(given, flight.cache)
                x = jnp.pad(made, [(0, self._rows - flight.rows), (0, 0), (0, 0)])
        self._inbox, shared = self._exchange(x, tokens)
        for flight in self._flights:
            flight.at += 1
            if flight.at == self._all:
                flight.token = shared[: flight.rows]
        self._flights = [flight for flight in self._flights if flight.token is None]

    def _exchange(self, x: Any, last: Any) -> tuple[Any, Any]:
        """x of the stage before, and what the last stage has for all."""
        sharding = NamedSharding(self._mesh, PartitionSpec(STAGE))

        def everyone(local: Any) -> Any:
            mine = jax.device_put(local, self._here)
            return jax.make_array_from_single_device_arrays(
                (self._all * mine.shape[0], *mine.shape[1:]), sharding, [mine]
            )

        moved, shared = _round(everyone(x), everyone(last), mesh=self._mesh)
        return moved.addressable_data(0), shared.addressable_data(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A cache of this process's layers; `flight` is the step that has it, while one does."""

    cache: KVCache
    slots: int
    length: np.ndarray
    flight: Flight | None = None


@partial(jax.jit, static_argnames="mesh")
def _round(x: Any, last: Any, *, mesh: Mesh) -> tuple[Any, Any]:
    count = mesh.shape[STAGE]

    def local(x: Any, last: Any) -> tuple[Any, Any]:
        moved = lax.ppermute(x, STAGE, [(i, i + 1) for i in range(count - 1)])
        mine = jnp.where(lax.axis_index(STAGE) == count - 1, last, 0)
        return moved, lax.psum(mine, STAGE)

    spec = PartitionSpec(STAGE)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec()))(x, last)
