"""What a plan says besides places holds for a model loaded by it: type, context, batch, cache, microbatches."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.data import Calibration
from qjax.errors import QjaxError, QjaxWarning
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.formats.source import open_source
from qjax.pipeline import Device, Pipeline, Plan, StagePlan
from qjax.pipeline.report import InfeasibleError

CONFIG = llama(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=264, context=160)
DEVICES = tuple(Device(f"cpu:{i}", 1 << 30, 1e10, 1e12, 1e10, 1e-6) for i in range(2))
PLAN = Plan((StagePlan(range(1), ("cpu:0",)), StagePlan(range(1, 2), ("cpu:1",))), DEVICES, 64, 4, 2, "int8")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "f16.gguf"
    save_synthetic(path, Shape("small", CONFIG), "f16")
    return path


def types(model: qjax.Model) -> set[float]:
    return {layer[name].bits_per_weight for layer in model.params["layers"] for name in ("attn_q", "ffn_down")}


def test_float_matrices_get_the_plans_type_or_the_one_asked_for(path: Path) -> None:
    plan = dataclasses.replace(PLAN, type="q4_0")
    assert types(qjax.load(path, plan=plan)) == {4.5}
    assert types(qjax.load(path, plan=plan, quantize="q8_0")) == {8.5}
    packed = path.with_name("packed.gguf")
    save_synthetic(packed, Shape("small", CONFIG), "q4_0")
    with pytest.raises(QjaxError, match="every matrix is quantized already; leave the type out"):
        qjax.load(packed, plan=plan)


def test_caches_are_the_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    init_cache = Pipeline.init_cache

    def spy(self: Pipeline, batch: int, slots: int, dtype: Any = jnp.float16) -> Any:
        made.append((batch, dtype))
        return init_cache(self, batch, slots, dtype)

    monkeypatch.setattr(Pipeline, "init_cache", spy)
    model = qjax.load(path, plan=PLAN)
    assert model.executor().microbatches == 2
    ids = [model.infer([1, 2, 3], 2, 0.0), model.infer([1, 2, 3], 2, 0.0, kv_cache="float")]
    assert made == [(1, jnp.int8), (1, jnp.float16)]
    assert all(len(some) == 2 for some in ids)


def test_more_than_there_is_room_for_is_refused(path: Path) -> None:
    model = qjax.load(path, plan=PLAN)
    with pytest.raises(QjaxError, match="60 prompt tokens and 5 new ones exceed the context of 64"):
        model.infer([1] * 60, 5)
    with pytest.raises(QjaxError, match="at most 4 rows, the plan's batch, got 5"):
        model.generate_many([[1, 2]], rows=5)
    with pytest.raises(QjaxError, match="expected at least one row"):
        next(iter(model.generate_many([[1, 2]], rows=0)))


def test_options_that_do_not_go_together_are_refused_before_anything_is_fetched() -> None:
    for wrong in (
        {"imatrix": "x"},
        {"effort": "high"},
        {"calibration": "x"},
        {"quantize": "q4_0", "plan": PLAN, "imatrix": "x"},
    ):
        with pytest.raises(QjaxError, match="is for a"):
            qjax.load("/nowhere.gguf", **wrong)


def test_a_recipe_has_its_bytes_counted(path: Path) -> None:
    recipe = qjax.GPTQ(4, 32, rules=["ffn_down=w8g32"])
    model = qjax.load(path, quantize=recipe, calibration=Calibration(np.ones((2, 16), np.int32), 2))
    named = {"attn_q": model.params["layers"][0]["attn_q"], "ffn_down": model.params["layers"][1]["ffn_down"]}
    counted = recipe.nbytes(open_source(path))
    for i, (name, array) in enumerate(named.items()):
        # But for the order of its columns.
        packed = sum(leaf.nbytes for leaf in jax.tree.leaves(array.plain() if hasattr(array, "plain") else array))
        assert counted[f"blk.{i}.{name}.weight"] == pytest.approx(packed, abs=4 * array.shape[1] + 64)
    small = dataclasses.replace(PLAN, devices=tuple(dataclasses.replace(d, memory=300_000) for d in DEVICES))
    with pytest.raises(InfeasibleError, match="does not fit: cpu:0 lacks"):
        qjax.load(path, quantize=recipe, calibration="/nowhere.txt", plan=small)


def test_of_a_function_nothing_is_known(path: Path) -> None:
    with pytest.warns(QjaxWarning, match="what a function makes is not known before"):
        qjax.load(path, quantize=lambda name, w: jnp.asarray(w), plan=PLAN)


def test_layers_that_a_plan_streams(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a second CPU, which is taken for an accelerator here."""
    monkeypatch.setattr("qjax.pipeline.plan.check_devices", lambda devices, streamed: None)
    stages = (StagePlan(range(1), ("cpu:1",)), StagePlan(range(1, 2), ("cpu:1",), streamed=True))
    plan = Plan(stages, DEVICES, 64)
    model, alone = qjax.load(path, plan=plan, quantize="q4_0"), qjax.load(path, quantize="q4_0")
    places = [{leaf.device.id for leaf in jax.tree.leaves(layer)} for layer in model.params["layers"]]
    assert places == [{1}, {0}]
    assert model.infer([1, 2, 3], 5, 0.0) == alone.infer([1, 2, 3], 5, 0.0)
