"""Models that other programs made, spread over eight virtual devices: the tokens and logits of one."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats.source import open_source
from qjax.generate import generate_ids
from qjax.models.load import checked_config
from qjax.pipeline import Device, Plan, StagePlan, one_stage

pytestmark = pytest.mark.interop

DEVICES = tuple(Device(f"cpu:{i}", 1 << 30, 1e10, 1e12, 1e10, 1e-6) for i in range(8))
MODELS = ("tiny-q4_K_M.gguf", "hf-gptq-w4g128-asym", "hf-gptq-w3g128", "hf-awq-w4g128", "hf-ct-int8-w8a8")


def plans(layers: int) -> dict[str, Plan]:
    names = [device.name for device in DEVICES]
    middle = layers // 2 + 1
    halves = range(middle), range(middle, layers)
    stages = {
        "a layer each": [StagePlan(range(i, i + 1), (names[i],)) for i in range(layers)],
        "2 x 2": [StagePlan(part, tuple(names[2 * i : 2 * i + 2])) for i, part in enumerate(halves)],
    }
    return {name: Plan(tuple(those), DEVICES, 128, 4) for name, those in stages.items()}


def outcome(executor: Any) -> tuple[np.ndarray, list[list[int]]]:
    prompts = [[1, 50, 9, 400], [70, 3], [1, 80, 22, 6, 31, 2, 2], [11]]
    logits, _ = executor.forward(jnp.asarray([prompts[2]], jnp.int32), executor.init_cache(1, 16, jnp.float32))
    made = generate_ids(executor, prompts, max_tokens=8, cache_dtype=jnp.float32)
    return np.asarray(logits), np.stack(list(made)).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::qjax.errors.QjaxWarning")
def test_tokens_are_those_of_one_device(interop: Path, name: str) -> None:
    alone = qjax.load(interop / name)
    wanted, tokens = outcome(one_stage(alone.params, alone.config))
    # Activations that are rounded to 8 bits change with the last bit of what is rounded.
    near = 2e-3 if "w8a8" in name else 1e-5
    for plan in plans(checked_config(open_source(interop / name)).layers).values():
        logits, found = outcome(qjax.load(interop / name, plan=plan).executor("float"))
        assert np.abs(logits - wanted).max() / np.abs(wanted).max() < near
        assert found == tokens
