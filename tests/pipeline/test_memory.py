"""What stages really hold, beside what the plan says before anything is loaded."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.evaluate.shapes import Shape, llama, shape_of
from qjax.evaluate.synthetic import save_synthetic
from qjax.formats.source import open_source
from qjax.models.forward import head, layer, turns
from qjax.pipeline import Device, make_plan
from qjax.pipeline.report import report
from qjax.pipeline.sizes import model_sizes

DEVICES = [Device(f"cpu:{i}", 1 << 33, 1e10, 1e12, 1e10, 1e-6) for i in range(3)]
SMALL = Shape("small", llama(layers=5, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=512, context=1024))


def live(tree: Any) -> Counter[str]:
    """Bytes of arrays by their device."""
    held: Counter[str] = Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[f"cpu:{shard.device.id}"] += shard.data.nbytes
    return held


def workspace(stage: Any, cache: Any, chunk: int) -> int:
    """The most that one of a stage's programs needs beside its arguments, with what goes in and out."""
    config = stage.config
    x = jnp.zeros((1, chunk, config.hidden), jnp.float32)
    angles, positions = turns({"rope": stage.params["rope"]}, chunk, jnp.zeros(1, jnp.int32))
    options = {"config": config, "activations": stage.activations}
    at = stage.put((x, angles, positions))
    needs = layer.lower(stage.params["layers"][0], *at, (cache.keys[0], cache.values[0]), **options).compile()
    found = [needs.memory_analysis()]
    if stage.ends[1]:
        mine = {key: stage.params[key] for key in ("output_norm", "output")}
        found.append(
            head.lower(mine, at[0], stage.put(jnp.zeros((1, 1), jnp.int32)), **options).compile().memory_analysis()
        )
    return max(one.temp_size_in_bytes for one in found) + 2 * x.nbytes


def measured(path: Path, context: int, ratio: str) -> list[tuple[int, int, int]]:
    """Of each stage: bytes of weights and cache there, with the workspace, and those planned in all."""
    file = open_source(path)
    count = ratio.count(":") + 1
    plan = make_plan(file, DEVICES[:count], context=context, mode=ratio)
    uses = report(plan, model_sizes(file, None)).uses
    model = qjax.load(path, plan=plan)
    executor: Any = model.executor()
    caches = executor.init_cache(1, context)
    jax.block_until_ready((model.params, caches))
    held = live(([stage.params for stage in executor.stages], caches))
    found = []
    for use, stage, cache in zip(uses, executor.stages, caches, strict=True):
        name = use.device.name
        # What lies there is planned to the byte, but for the rotary frequencies and the lengths.
        assert abs(held[name] - use.held.weights - use.held.cache) < 4096, name
        found.append((held[name], workspace(stage, cache, 512), use.used))
    return found


@pytest.mark.parametrize("mix", ["q4_0", "q4_k_m", "f16"])
def test_weights_and_cache_are_planned_to_the_byte(tmp_path: Path, mix: str) -> None:
    save_synthetic(tmp_path / "small.gguf", SMALL, mix)
    for held, work, planned in measured(tmp_path / "small.gguf", 1024, "2:1:1"):
        assert held + work <= planned


@pytest.mark.slow
def test_peak_memory_is_the_plans(tmp_path: Path) -> None:
    """Live buffers and the largest program's needs, within 5 %."""
    save_synthetic(tmp_path / "large.gguf", shape_of("tinyllama-1.1b"), "q4_0")
    for held, work, planned in measured(tmp_path / "large.gguf", 2048, "1:1"):
        print(f"{(held + work) / 2**20:.1f} MiB, planned {planned / 2**20:.1f}")
        assert held + work == pytest.approx(planned, rel=0.05)
