"""Many prompts at once: rows of one batch, each taken by the next prompt as soon as its text has ended.

    row 0  [prompt 0 ..........][prompt 3 ....][prompt 5 ..
    row 1  [prompt 1 ...][prompt 2 ...................][pro
                         ^ read while the others wait, then put into the row's place of the cache

(Continuous batching: Yu et al. 2022, Orca.) A prompt draws by a seed of its own, so that its text does not depend on
what runs beside it. Several groups of rows keep the stages of a pipeline busy, and several replicas of the model share
the prompts.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.generate.engine import NEW_SLOTS, check_prompt, first_tokens, prefill, row_groups, row_keys, with_room
from qjax.generate.sampling import Greedy, Sampler
from qjax.models.slots import slots_for
from qjax.pipeline import Executor


class Finished(NamedTuple):
    """What followed a prompt: token `ids`, without the one that ended them if it was one of `ends`."""

    index: int
    ids: list[int]
    stopped: bool


@dataclasses.dataclass
class _Row:
    index: int
    prompt: Sequence[int]
    ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def positions(self) -> int:
        return len(self.prompt) + len(self.ids)


Waiting = Iterator[tuple[int, Sequence[int]]]


class _Group:
    """Rows that take their steps together: one cache, one batch."""

    def __init__(self, model: Executor, size: int, options: "Options", waiting: Waiting) -> None:
        self.model, self.options, self.waiting = model, options, waiting
        self.rows: list[_Row | None] = [None] * size
        first = [row for row in (self._next() for _ in range(size)) if row is not None]
        self.rows[: len(first)] = first
        self.token: Any = None
        if not first:
            return
        # Rows that no prompt is left for repeat the first one, unseen.
        prompts = [row.prompt for row in first] + [first[0].prompt] * (size - len(first))
        longest = max(map(len, prompts))
        indices = [row.index for row in first] + [0] * (size - len(first))
        slots = slots_for(longest, min(options.max_tokens, NEW_SLOTS))
        (self.token, self.seen, self.keys), self.cache = self._begun(prompts, indices, slots)
        self.lengths = np.array([len(p) for p in prompts])

    def _next(self) -> _Row | None:
        found = next(self.waiting, None)
        return None if found is None else _Row(*found)

    def _begun(self, prompts: Sequence[Sequence[int]], indices: Sequence[int], slots: int) -> tuple[Any, Any]:
        """First tokens, tokens seen and keys of prompts that were read, and their cache."""
        options = self.options
        cache = self.model.init_cache(len(prompts), slots, options.cache_dtype)
        logits, cache = prefill(self.model, prompts, cache)
        keys = row_keys(options.seed, np.array(indices))
        return first_tokens(self.model, logits, prompts, keys, sampler=options.sampler), cache

    @property
    def busy(self) -> bool:
        return any(row is not None for row in self.rows)

    def step(self) -> Iterator[Finished]:
        """Read the tokens that are due while the next ones are made; what ended gives its place to the next prompt."""
        due = self.token
        self.cache = with_room(self.model, self.cache, int(self.lengths.max()))
        self.token, self.seen, self.keys, self.cache = self.model.advance(
            due, self.cache, self.seen, self.keys, sampler=self.options.sampler
        )
        self.lengths += 1
        free = []
        for i, token in enumerate(np.asarray(due).tolist()):
            row = self.rows[i]
            if row is None:
                self.lengths[i] = 0
                continue
            stopped = token in self.options.ends
            if not stopped:
                row.ids.append(token)
            full = len(row.ids) >= self.options.max_tokens or row.positions >= self.model.config.context
            if stopped or full:
                yield Finished(row.index, row.ids, stopped)
                self.rows[i] = None
                free.append(i)
        for i in free:
            row = self._next()
            if row is not None:
                self._admit(i, row)

    def _admit(self, i: int, row: _Row) -> None:
        """Read a prompt, and give it row i of the batch."""
        model = self.model
        state, one = self._begun([row.prompt], [row.index], slots_for(len(row.prompt), 0))
        self.cache = with_room(model, self.cache, max(int(self.lengths.max()), model.slots(one) - 1))
        self.cache = model.insert(self.cache, i, one)
        self.token, self.seen, self.keys = model.replace((self.token, self.seen, self.keys), i, state)
        self.rows[i] = row
        self.lengths[i] = len(row.prompt)


@dataclasses.dataclass(frozen=True)
class Options:
    """What all prompts share; a prompt draws as it does alone with the seed `seed` + its index."""

    max_tokens: int
    ends: frozenset[int]
    sampler: Sampler
    seed: int
    cache_dtype: Any


def _run(model: Executor, waiting: Waiting, rows: int, options: Options) -> Iterator[Finished]:
    """Texts as they end."""
    shares = row_groups(rows, model.microbatches)
    groups = [_Group(model, share.stop - share.start, options, waiting) for share in shares]
    while groups := [group for group in groups if group.busy]:
        for group in groups:
            yield from group.step()


def generate_many_ids(
    models: Executor | Sequence[Executor],
    prompts: Iterable[Sequence[int]],
    *,
    max_tokens: int,
    ends: Iterable[int] = (),
    rows: int = 8,
    sampler: Sampler | None = None,
    seed: int = 0,
    cache_dtype: Any = jnp.float16,
) -> Iterator[Finished]:
    """What follows each prompt, in the order of the prompts, which may be without end.

    Args:
      models: one executor, or replicas of a model on different devices, which take prompts in turn.
      max_tokens: of each text, which ends before if the model's context is full.
      ends: tokens that end a text.
      rows: texts that each replica makes at a time.
      seed: prompt number i draws as it does alone with seed + i.

    Raises:
      QjaxError: a prompt that is empty, too long, or has ids that are not in the vocabulary; names its number.
    """
    replicas = [models] if isinstance(models, Executor) else list(models)
    if rows < 1 or max_tokens < 1 or not replicas:
        raise QjaxError(f"expected at least one row, token and replica, got {rows}, {max_tokens} and {len(replicas)}")
    config = replicas[0].config

    def checked() -> Waiting:
        for index, prompt in enumerate(prompts):
            try:
                check_prompt(config, prompt, 1)
            except QjaxError as error:
                raise QjaxError(f"prompt {index}: {error}") from error
            yield index, prompt

    options = Options(max_tokens, frozenset(ends), sampler or Greedy(), seed, cache_dtype)
    if len(replicas) == 1:
        yield from _in_order(_run(replicas[0], checked(), rows, options))
    else:
        yield from _in_order(_shared(replicas, checked(), rows, options))


def _in_order(finished: Iterator[Finished]) -> Iterator[Finished]:
    held: dict[int, Finished] = {}
    wanted = 0
    for one in finished:
        held[one.index] = one
        while wanted in held:
            yield held.pop(wanted)
            wanted += 1


def _shared(replicas: Sequence[Executor], waiting: Waiting, rows: int, options: Options) -> Iterator[Finished]:
    """Texts of all replicas, each in a thread of its own, as they end."""
    lock, done, stop = threading.Lock(), queue.Queue(), threading.Event()

    def taken() -> Waiting:
        while not stop.is_set():
            with lock:
                found = next(waiting, None)
            if found is None:
                return
            yield found

    def work(model: Executor) -> None:
        try:
            for one in _run(model, taken(), rows, options):
                done.put(one)
            done.put(None)
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=work, args=(model,), daemon=True) for model in replicas]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            one = done.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                running -= 1
            else:
                yield one
    finally:
        stop.set()
