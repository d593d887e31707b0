"""Tokens a second as llama-bench measures them, so that figures of both can be compared.

pp512: the prompt of 512 tokens goes through an empty cache, in the chunks that `generate` uses. tg128: 128 tokens are
decoded one by one from an almost empty cache. Each is run once before the clock starts, so that no compilation
counts; then `repeat` times. Source: llama.cpp's tools/llama-bench.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.generate.engine import decode, prefill, slots_for
from qjax.generate.sampling import Greedy
from qjax.models import ModelConfig
from qjax.pipeline import Executor

# Tokens that the warm-up decodes: the compiled programs are all there after the second.
WARM_UP_TOKENS = 4


class Row(NamedTuple):
    """One line of the table: the mean of `samples` (tokens a second, one a repeat) and their standard deviation."""

    test: str
    tokens_per_second: float
    std: float
    samples: list[float]


def _row(test: str, samples: list[float]) -> Row:
    return Row(test, statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0, samples)


def _prompt(config: ModelConfig, length: int) -> list[int]:
    """Random token ids: what they are does not change the work."""
    return np.random.default_rng(0).integers(0, config.vocab, length).tolist()


def _time_prefill(model: Executor, length: int, cache_dtype: Any) -> float:
    """Seconds from a prompt to the logits after its last token."""
    prompt = _prompt(model.config, length)
    cache = jax.block_until_ready(model.init_cache(1, slots_for(length, 0), cache_dtype))
    start = time.perf_counter()
    jax.block_until_ready(prefill(model, [prompt], cache))
    return time.perf_counter() - start


def _time_decode(model: Executor, tokens: int, run: int, cache_dtype: Any) -> float:
    """Seconds for `run` decode steps after a prompt of one token, in a cache that has room for `tokens`."""
    prompt = _prompt(model.config, 1)
    empty = model.init_cache(1, slots_for(1, tokens), cache_dtype)
    # Not `prefill`: it would pad the one token to a chunk.
    logits, cache = model.forward(jnp.asarray([prompt], jnp.int32), empty)
    logits, cache = jax.block_until_ready((logits[:, 0], cache))
    start = time.perf_counter()
    # The first token comes from the prompt's logits: `run` steps give one more.
    for _ in decode(model, logits, cache, prompts=[prompt], steps=run + 1, sampler=Greedy()):
        pass
    return time.perf_counter() - start


def measure(
    model: Executor,
    *,
    pp: int,
    tg: int,
    repeat: int,
    cache_dtype: Any = jnp.float16,
    progress: Callable[[str, int, int], None] = lambda test, done, repeats: None,
) -> list[Row]:
    """Speed of a model, batch 1: one row for the prompt (pp) and one for decoding (tg).

    Args:
      model: on the devices to measure.
      pp: tokens of the prompt; 0 for no such row.
      tg: tokens to decode, greedily, each by a forward of one token; 0 for no such row.
      repeat: samples of each.
      cache_dtype: of the KV cache.
      progress: called as (test, samples done, repeat), first with 0 once the warm-up is over.

    Raises:
      QjaxError: nothing to measure, or more tokens than the model's context.
    """
    if pp < 0 or tg < 0 or pp + tg == 0 or repeat < 1:
        raise QjaxError(f"expected tokens to measure and at least one repeat, got pp {pp}, tg {tg}, repeat {repeat}")
    # A decoded token follows a prompt of one.
    longest = max(pp, tg + 1 if tg else 0)
    if longest > model.config.context:
        raise QjaxError(f"pp {pp} and tg {tg} need {longest} positions, the model's context is {model.config.context}")
    tests: list[tuple[str, int, Callable[[], float], Callable[[], float]]] = []
    if pp:
        run = lambda: _time_prefill(model, pp, cache_dtype)
        tests.append((f"pp{pp}", pp, run, run))
    if tg:
        decode_steps = lambda steps: _time_decode(model, tg, steps, cache_dtype)
        tests.append((f"tg{tg}", tg, lambda: decode_steps(min(tg, WARM_UP_TOKENS)), lambda: decode_steps(tg)))
    rows = []
    for test, tokens, warm_up, timed in tests:
        warm_up()
        progress(test, 0, repeat)
        samples = []
        for done in range(repeat):
            samples.append(tokens / timed())
            progress(test, done + 1, repeat)
        rows.append(_row(test, samples))
    return rows


def peak_bytes() -> int:
    """The most memory that this process has had resident so far, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Kilobytes on Linux and the BSDs, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _siblings(core: int) -> str:
    """The hardware threads that share a physical core with this one, as Linux lists them."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)


def limit_threads(count: int) -> None:
    """Let this process use `count` of the cores it may use now, and so XLA:CPU that many threads.

    XLA:CPU makes its thread pool when JAX first meets a device, one thread a core of the affinity mask of that
    moment: call this before (importing JAX does no harm). It has no setting of its own for the number. Cores are
    taken one a physical core first.

    Raises:
      QjaxError: fewer cores than `count` are allowed, or the system has no affinity masks (Linux has).
    """
    if not hasattr(os, "sched_setaffinity"):
        raise QjaxError("the number of threads can be limited on Linux only: leave it out")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise QjaxError(f"expected 1 to {len(allowed)} threads, the cores that this process may use, got {count}")
    seen: dict[str, int] = {}
    rank = {}
    for core in allowed:
        group = _siblings(core)
        rank[core] = seen[group] = seen.get(group, -1) + 1
    os.sched_setaffinity(0, sorted(allowed, key=lambda core: (rank[core], core))[:count])
