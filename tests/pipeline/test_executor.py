"""Models in stages on eight virtual devices, against the same model on one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.data import Calibration
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.generate import generate_ids
from qjax.pipeline import Device, Plan, StagePlan, one_stage

LAYERS = 8
CONFIG = llama(layers=LAYERS, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=264, context=160)
PROMPTS = [[1, 5, 9, 4], [7, 3], [1, 80, 22, 6, 31, 2, 2], [11]]

# Layers of each stage, and the devices of each.
STAGES: dict[str, tuple[list[int], list[int]]] = {
    "1": ([8], [1]),
    "2 uneven": ([3, 5], [1, 1]),
    "3": ([4, 1, 3], [1, 1, 1]),
    "5": ([1, 2, 1, 1, 3], [1] * 5),
    "8": ([1] * 8, [1] * 8),
    "embedding and head alone": ([0, 8, 0], [1] * 3),
    "mesh of 2": ([8], [2]),
    "mesh of 4": ([8], [4]),
    "2 x 2": ([5, 3], [2, 2]),
    "2 x 4": ([2, 6], [4, 4]),
    "mesh beside a device": ([3, 5], [1, 4]),
}


def plan_of(name: str, layers: int = LAYERS) -> Plan:
    counts, widths = STAGES[name]
    names = iter(f"cpu:{i}" for i in range(8))
    bounds = np.cumsum([0, *counts]).tolist()
    assert bounds[-1] == layers
    stages = tuple(
        StagePlan(range(a, b), tuple(next(names) for _ in range(width)))
        for a, b, width in zip(bounds[:-1], bounds[1:], widths, strict=True)
    )
    devices = tuple(Device(f"cpu:{i}", 1 << 30, 1e10, 1e12, 1e10, 1e-6) for i in range(8))
    return Plan(stages, devices, context=160, batch=4)


def greedy(executor: Any, n: int = 6) -> list[list[int]]:
    return np.stack(list(generate_ids(executor, PROMPTS, max_tokens=n, cache_dtype=jnp.float32)), axis=1).tolist()


def logits(executor: Any) -> np.ndarray:
    """Of a chunk and of what follows it, so that both ways of writing to a cache are seen."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 8)), jnp.int32)
    cache = executor.init_cache(2, 16, jnp.float32)
    first, cache = executor.forward(tokens[:, :6], cache)
    second, _ = executor.forward(tokens[:, 6:], cache)
    return np.concatenate([np.asarray(first), np.asarray(second)], axis=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("f32", "q4_0"):
        save_synthetic(folder / f"{kind}.gguf", Shape("small", CONFIG), kind)
    return folder


TOKENS = np.random.default_rng(1).integers(0, 264, (4, 32)).astype(np.int32)
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "gguf": dict,
    "gptq": lambda: {"quantize": qjax.GPTQ(4, 32, static_groups=False), "calibration": Calibration(TOKENS, 4)},
    "awq": lambda: {"quantize": qjax.RTN(4, 16, symmetric=False)},
}


@functools.cache
def options(kind: str) -> dict[str, Any]:
    return KINDS[kind]()


def opened(files: Path, kind: str, **more: Any) -> qjax.Model:
    return qjax.load(files / ("q4_0.gguf" if kind == "gguf" else "f32.gguf"), **options(kind), **more)


@pytest.fixture(scope="module")
def wanted(files: Path) -> Callable[[str], tuple[list[list[int]], np.ndarray]]:
    """Tokens and logits on a single device."""

    @functools.cache
    def of(kind: str) -> tuple[list[list[int]], np.ndarray]:
        model = opened(files, kind)
        executor = one_stage(model.params, model.config)
        return greedy(executor), logits(executor)

    return of


def cases() -> list[tuple[str, str]]:
    some = ("2 uneven", "2 x 2", "2 x 4")
    return [("gguf", name) for name in STAGES] + [(kind, name) for kind in ("gptq", "awq") for name in some]


@pytest.mark.parametrize(("kind", "name"), cases())
def test_any_plan_gives_the_tokens_of_one_device(files: Path, wanted: Any, kind: str, name: str) -> None:
    tokens, expected = wanted(kind)
    model = opened(files, kind, plan=plan_of(name))
    executor = model.executor("float")
    assert len(executor.stages) == len(STAGES[name][0])
    got = logits(executor)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-5
    assert greedy(executor) == tokens
