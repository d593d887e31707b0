"""What `measure` counts and when its clock runs; figures themselves are the benchmarks' business."""

import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax.monitoring
import jax.numpy as jnp
import pytest

from qjax.errors import QjaxError
from qjax.evaluate import speed
from qjax.evaluate.shapes import llama
from qjax.evaluate.speed import limit_threads, measure, peak_bytes
from qjax.evaluate.synthetic import synthetic_params
from qjax.pipeline import Pipeline, one_stage

CONFIG = llama(layers=2, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=512, context=600)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return synthetic_params(CONFIG, "q4_0")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens a row of each call of a model."""
    lengths: list[int] = []

    def watch(name: str, tokens_of: Callable[[Any], int]) -> None:
        real: Callable = getattr(Pipeline, name)

        def spy(self: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
            lengths.append(tokens_of(tokens))
            return real(self, tokens, *rest, **options)

        monkeypatch.setattr(Pipeline, name, spy)

    watch("forward", lambda tokens: tokens.shape[1])
    watch("advance", lambda tokens: 1)
    return lengths


def test_rows_are_those_of_llama_bench(params: dict[str, Any]) -> None:
    rows = measure(one_stage(params, CONFIG), pp=40, tg=6, repeat=3)
    assert [row.test for row in rows] == ["pp40", "tg6"]
    for row in rows:
        assert len(row.samples) == 3
        assert min(row.samples) > 0
        assert row.tokens_per_second == pytest.approx(statistics.fmean(row.samples))
        assert row.std == pytest.approx(statistics.stdev(row.samples))
    assert [row.test for row in measure(one_stage(params, CONFIG), pp=0, tg=2, repeat=1)] == ["tg2"]
    assert [(row.test, row.std) for row in measure(one_stage(params, CONFIG), pp=5, tg=0, repeat=1)] == [("pp5", 0.0)]


def test_what_runs_is_what_the_row_says(params: dict[str, Any], forwards: list[int]) -> None:
    measure(one_stage(params, CONFIG), pp=40, tg=6, repeat=2)
    # Warm-up and two samples of 40 tokens: two small chunks each.
    assert forwards[:6] == [32, 32] * 3
    # A prompt of one token, then a forward a token: 4 to warm up, 6 a sample.
    assert forwards[6:] == [1] * (5 + 7 + 7)


def test_nothing_is_compiled_while_the_clock_runs(params: dict[str, Any]) -> None:
    compiled: list[str] = []
    at: dict[tuple[str, int], int] = {}

    def listen(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    def progress(test: str, done: int, repeats: int) -> None:
        assert repeats == 2
        at[test, done] = len(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    # A chunk and a cache that no other test has compiled for.
    measure(one_stage(params, CONFIG), pp=300, tg=12, repeat=2, cache_dtype=jnp.bfloat16, progress=progress)
    assert compiled
    assert at["pp300", 0] == at["pp300", 2] > 0
    assert at["tg12", 0] == at["tg12", 2]


def test_the_clock_divides_tokens_by_seconds(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_time_prefill", lambda *_: 0.5)
    monkeypatch.setattr(speed, "_time_decode", lambda *_: 2.0)
    prefill, decode = measure(one_stage(params, CONFIG), pp=100, tg=10, repeat=2)
    assert prefill.samples == [200.0, 200.0]
    assert decode == speed.Row("tg10", 5.0, 0.0, [5.0, 5.0])


@pytest.mark.parametrize(
    ("pp", "tg", "repeat", "message"),
    [
        (0, 0, 1, "expected tokens to measure"),
        (-1, 4, 1, "expected tokens to measure"),
        (4, 4, 0, "at least one repeat"),
        (601, 4, 1, "need 601 positions, the model's context is 600"),
        (4, 600, 1, "need 601 positions"),
    ],
)
def test_bad_sizes_are_errors(params: dict[str, Any], pp: int, tg: int, repeat: int, message: str) -> None:
    with pytest.raises(QjaxError, match=message):
        measure(one_stage(params, CONFIG), pp=pp, tg=tg, repeat=repeat)


def test_peak_covers_what_was_resident() -> None:
    before = peak_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_bytes() >= max(before, 64 << 20)
    if sys.platform == "linux":
        assert peak_bytes() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_limit_threads_before_jax_starts() -> None:
    """In a process of its own, since it cannot be undone for a running JAX."""
    script = """
import os, pathlib
from qjax.evaluate.speed import limit_threads
limit_threads(1)
import jax.numpy as jnp
jnp.ones((256, 256)).dot(jnp.ones((256, 256))).block_until_ready()
tasks = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
print(len(os.sched_getaffinity(0)), sum("XLAEigen" in name for name in tasks))
"""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_limit_threads_takes_physical_cores_first(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: chosen.append(set(cores)))
    monkeypatch.setattr(speed, "_siblings", lambda core: f"{core // 2}")
    for count in (1, 3, 4, 5):
        limit_threads(count)
    assert chosen == [{0}, {0, 2, 6}, {0, 1, 2, 6}, {0, 1, 2, 3, 6}]
    for count in (0, 6):
        with pytest.raises(QjaxError, match=f"expected 1 to 5 threads, .*, got {count}"):
            limit_threads(count)


def test_limit_threads_without_affinity_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(QjaxError, match="on Linux only"):
        limit_threads(1)
