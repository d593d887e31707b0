"""Models in stages on eight virtual devices, against the same model on one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.data import Calibration
from qjax.errors import QjaxError
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.generate import generate_ids
from qjax.pipeline import Device, Pipeline, Plan, Stage, StagePlan, one_stage
from qjax.pipeline.stage import Streamed
from qjax.pipeline.tensor_parallel import Parts, cut, model_mesh

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


# Each stage is compiled for its device: the others take minutes.
QUICK = {("gguf", "embedding and head alone"), ("gguf", "8"), ("gguf", "2 x 4"), ("gptq", "2 uneven")}


def cases() -> list[Any]:
    some = ("2 uneven", "2 x 2", "2 x 4")
    every = [("gguf", name) for name in STAGES] + [(kind, name) for kind in ("gptq", "awq") for name in some]
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("kind", "name"), cases())
def test_any_plan_gives_the_tokens_of_one_device(files: Path, wanted: Any, kind: str, name: str) -> None:
    tokens, expected = wanted(kind)
    model = opened(files, kind, plan=plan_of(name))
    executor = model.executor("float")
    assert len(executor.stages) == len(STAGES[name][0])
    got = logits(executor)
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-5
    assert greedy(executor) == tokens


def test_layers_can_stay_on_the_host(files: Path, wanted: Any) -> None:
    """They go to the device packed, one by one, and no more than two of them are there at a time."""
    tokens, expected = wanted("gguf")
    model = opened(files, "gguf")
    host, device = jax.devices()[:2]
    first = {key: array for key, array in model.params.items() if key != "layers"}
    held = jax.device_put(model.params["layers"], host)
    streamed = Stage({**jax.device_put(first, device), "layers": Streamed(held, device)}, model.config, device)
    executor = Pipeline((streamed,))
    assert np.abs(logits(executor) - expected).max() / np.abs(expected).max() < 1e-5
    assert greedy(executor) == tokens
    assert streamed.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    seen = [sum(leaf.device == device for leaf in jax.live_arrays()) for _ in streamed.params["layers"]]
    layer = len(jax.tree.leaves(held[0]))
    assert max(seen) - min(seen) <= layer


def test_what_travels_is_packed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes put on devices while loading are those of the packed model, and while decoding those of hidden states."""
    put, moved = jax.device_put, []

    def spy(x: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(sum(leaf.nbytes for leaf in jax.tree.leaves(x)))
        return put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", spy)
    model = opened(files, "gguf", plan=plan_of("3"))
    assert sum(moved) == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    executor = model.executor("float")
    cache = executor.init_cache(1, 32, jnp.float32)
    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    executor.forward(tokens, cache)
    moved.clear()
    executor.forward(tokens, executor.init_cache(1, 32, jnp.float32))
    states = 2 * 4 * CONFIG.hidden * 4
    slots = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.init_cache(1, 32, jnp.float32)))
    assert sum(moved) <= states + slots * 2 + 1000


def test_heads_that_cannot_be_shared_are_refused_before_loading(files: Path) -> None:
    devices = plan_of("1").devices
    plan = Plan((StagePlan(range(8), ("cpu:0", "cpu:1", "cpu:2")),), devices, 160)
    seen: list[str] = []
    with pytest.raises(QjaxError, match=r"4 heads, 2 key heads .* cannot be shared out among 3 devices"):
        opened(files, "gguf", plan=plan, progress=seen.append)
    assert seen == []


def test_devices_that_are_not_there(files: Path) -> None:
    plan = Plan((StagePlan(range(8), ("cuda:0",)),), (Device("cuda:0", 1 << 34, 1e12, 1e14, 1e10, 1e-5),), 160)
    with pytest.raises(QjaxError, match="there is no device cuda:0 here; there are cpu:0, cpu:1"):
        opened(files, "gguf", plan=plan)


def test_a_weight_in_parts_is_the_weight() -> None:
    """Of each part the rows or columns that it has, whatever the family."""
    mesh = model_mesh(jax.devices()[:2])
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for name, kind in {"attn_q": "rows", "attn_output": "columns"}.items():
        parts = cut(name, w, mesh, CONFIG)
        assert isinstance(parts, Parts)
        assert parts.kind == kind
        halves = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], parts.weight) for i in range(2)]
        joined = np.concatenate([np.asarray(half) for half in halves], axis=0 if kind == "rows" else 1)
        np.testing.assert_array_equal(joined, w)
