"""What plans come to, for real models: bytes as they will be, the most that fits, what would fit if nothing does."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.errors import QjaxError
from qjax.evaluate.shapes import shape_of
from qjax.evaluate.synthetic import synthetic_params
from qjax.formats.gguf.container import GGUFFile
from qjax.formats.locate import EMBEDDED
from qjax.formats.source import open_source
from qjax.kernels import native, rope_angles
from qjax.models import init_cache
from qjax.models.forward import head, layer
from qjax.pipeline import Device, Plan, StagePlan, make_plan
from qjax.pipeline.costs import MARGIN, Costs
from qjax.pipeline.devices import make_device, parse_devices
from qjax.pipeline.make import check_plan, parse_ratio, stages_by_ratio
from qjax.pipeline.report import InfeasibleError, lacking, report
from qjax.pipeline.sizes import model_sizes

from .conftest import uneven

SEVEN = shape_of("llama-7b").config
ONE = shape_of("tinyllama-1.1b").config
GIB = 1 << 30


@pytest.mark.skipif(not EMBEDDED.exists(), reason="the embedded model is not there")
@pytest.mark.parametrize("kind", [None, "q8_0", "q4_k_m"])
def test_bytes_of_weights_are_those_of_the_loaded_model(kind: str | None) -> None:
    sizes = model_sizes(open_source(EMBEDDED), kind)
    assert sizes.weights(0, len(sizes.units), "cpu") == qjax.load(EMBEDDED, quantize=kind).memory.nbytes


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore::qjax.errors.QjaxWarning")
def test_bytes_of_weights_of_other_programs_files(interop: Path) -> None:
    paths = [*interop.glob("tiny-*.gguf"), *(path for path in interop.glob("hf-*") if path.is_dir())]
    assert len(paths) > 20
    for path in sorted(paths):
        sizes = model_sizes(open_source(path))
        held = qjax.load(path).memory.nbytes
        assert sizes.weights(0, len(sizes.units), "cpu") == pytest.approx(held, rel=0.05), path


@pytest.mark.parametrize(("slots_of", "kind"), [(1024, "float"), (1000, "int8"), (3, "float")])
def test_bytes_of_the_cache(slots_of: int, kind: Any) -> None:
    costs = Costs(model_sizes(ONE), slots_of, batch=3, cache=kind)
    cache = init_cache(dataclasses.replace(ONE, layers=2), 3, costs.slots, jnp.int8 if kind == "int8" else jnp.float16)
    assert costs.slots >= slots_of
    assert costs.held(1, 3, "cpu").cache == cache.nbytes
    # Four key heads over two devices, or over eight, each of which has one.
    assert costs.held(1, 3, "cpu", 2).cache == cache.nbytes // 2
    assert costs.held(1, 3, "cpu", 8).cache == cache.nbytes // 4


@pytest.mark.parametrize("batch", [1, 2])
def test_workspace_is_what_xla_says(batch: int) -> None:
    """Of a layer for a chunk of a prompt, and of the head: within the margin."""
    config = dataclasses.replace(ONE, layers=1)
    costs = Costs(model_sizes(config), 1024, batch)
    params = synthetic_params(config, "q4_k_m")
    x = jax.ShapeDtypeStruct((batch, costs.chunk, config.hidden), jnp.float32)
    positions = jnp.zeros((batch, costs.chunk), jnp.int32)
    cache = init_cache(config, batch, costs.slots)
    held = (cache.keys[0], cache.values[0])
    angles = rope_angles(positions, params["rope"])
    found = layer.lower(params["layers"][0], x, angles, positions, held, config=config).compile().memory_analysis()
    # What comes in and goes out is in the program's arguments and results.
    live = 2 * x.size * 4 + sum(angle.nbytes for angle in angles) + found.temp_size_in_bytes
    planned = costs.held(1, 2, "cpu").work
    assert live <= planned
    assert planned < live * (1 + MARGIN) * 1.25
    ends = {name: params[name] for name in ("token_embd", "output", "output_norm")}
    at = positions[:, :1]
    found = head.lower(ends, x, at, config=config, activations="float").compile().memory_analysis()
    assert found.temp_size_in_bytes + found.output_size_in_bytes <= costs.held(2, 3, "cpu").work
    assert native.available() or planned > 2 * costs.slots * costs.chunk * config.heads * 4


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight is read")

    source = open_source(EMBEDDED)
    monkeypatch.setattr(GGUFFile, "raw", refuse)
    monkeypatch.setattr(GGUFFile, "array", refuse)
    for kind in (None, "q4_k_m", "q8_0"):
        plan = make_plan(source, parse_devices("cpu:0=4MiB,cpu:1=1GiB"), context=64, type=kind)
        assert report(plan, model_sizes(source, kind)).tokens_per_second > 0


def test_tied_embeddings_are_counted_where_they_lie() -> None:
    sizes = uneven(ONE, [1000, 1000], ends=(5000, 0), tied=True)
    assert sizes.weights(0, 4, "cpu") == 5000 + 2000 + 64
    assert sizes.weights(0, 2, "cpu") + sizes.weights(2, 4, "cpu") == 2 * 5000 + 2000 + 64
    devices = (make_device("cuda:0", GIB), make_device("cpu:0", GIB))
    ends = [StagePlan(range(1), ("cuda:0",)), StagePlan(range(1, 2), ("cpu:0",)), StagePlan(range(2, 2), ("cuda:0",))]
    apart = Plan(tuple(ends[:2]), devices, 64)
    around = Plan(tuple(ends), devices, 64)
    held = lambda plan: {use.device.name: use.held.weights for use in report(plan, sizes).uses}
    assert held(apart) == {"cuda:0": 6000, "cpu:0": 6064}
    assert held(around) == {"cuda:0": 6064, "cpu:0": 1000}


def test_a_mesh_shares_weights() -> None:
    sizes = model_sizes(ONE, "q8_0")
    alone = sizes.weights(1, 2, "cpu")
    norms, kv = 2 * 2048 * 4, 2 * 256 * 2048 * 34 // 32
    assert sizes.weights(1, 2, "cpu", 4) == norms + (alone - norms) // 4
    # Of four key heads each of eight devices has one.
    assert sizes.weights(1, 2, "cpu", 8) == norms + kv // 4 + (alone - norms - kv) // 8
    plan = Plan((StagePlan(range(22), ("cpu:0", "cpu:1", "cpu:2")),), parse_devices("cpu:0=1G,cpu:1=1G,cpu:2=1G"), 64)
    with pytest.raises(QjaxError, match="cannot be shared out among 3 devices"):
        report(plan, sizes)


def test_a_7b_on_a_gpu_and_a_cpu() -> None:
    devices = parse_devices("cuda:0=4GiB,cpu:0=16GiB")
    plan = make_plan(SEVEN, devices, context=2048, batch=2, type="q4_k_m")
    made = report(plan, model_sizes(SEVEN, "q4_k_m"))
    assert {use.device.name for use in made.uses if use.units != "nothing"} == {"cuda:0", "cpu:0"}
    assert all(use.free >= 0 for use in made.uses)
    # llama.cpp's file of this shape has 4.08 GB.
    assert sum(use.held.weights for use in made.uses) == pytest.approx(4.08e9, rel=0.01)
    assert sum(use.held.cache for use in made.uses) == 32 * 2 * (2 * 32 * 2048 * 128 * 2)
    assert sum(use.share for use in made.uses) == pytest.approx(1)
    assert made.lacks == {}
    roomy = make_plan(SEVEN, parse_devices("cuda:0=40GiB,cpu:0=16GiB"), context=2048, batch=2, type="q4_k_m")
    assert {name for stage in roomy.stages for name in stage.devices} == {"cuda:0"}
    assert report(roomy, model_sizes(SEVEN, "q4_k_m")).tokens_per_second > made.tokens_per_second


def with_batch(plan: Plan, batch: int) -> Plan:
    return dataclasses.replace(plan, batch=batch, microbatches=min(plan.microbatches, batch))


@settings(max_examples=6)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(1, 1024), st.sampled_from(["latency", "throughput"]))
def test_the_largest_batch_and_context_fit_and_more_does_not(
    gib: int, batch: int, context: int, objective: Any
) -> None:
    sizes = model_sizes(ONE, "q4_0")
    devices = parse_devices(f"cuda:0={gib}GiB,cpu:0={gib}GiB")
    try:
        plan = make_plan(ONE, devices, context=context, batch=batch, type="q4_0", objective=objective)
    except InfeasibleError:
        return
    made = report(plan, sizes)
    assert made.largest_batch >= batch
    assert made.largest_context >= context
    assert not lacking(with_batch(plan, made.largest_batch), sizes)
    assert lacking(with_batch(plan, made.largest_batch + 1), sizes)
    assert not lacking(dataclasses.replace(plan, context=made.largest_context), sizes)
    if made.largest_context < ONE.context:
        assert lacking(dataclasses.replace(plan, context=made.largest_context + 1), sizes)


@pytest.mark.slow
def test_what_fits_instead() -> None:
    devices = parse_devices("cuda:0=3GiB,cpu:0=1GiB")
    with pytest.raises(InfeasibleError, match=r"cpu:0 lacks .*GiB; what fits: ") as refused:
        make_plan(SEVEN, devices, context=4096, batch=2, type="q4_k_m")
    assert refused.value.report.lacks
    assert refused.value.nearest
    for _, plan in refused.value.nearest:
        assert not lacking(plan, model_sizes(SEVEN, plan.type))
    with pytest.raises(InfeasibleError, match="nothing smaller fits either"):
        make_plan(SEVEN, parse_devices("cpu:0=64MiB"))
    tight = parse_devices("cpu:0=7GiB")
    with pytest.raises(InfeasibleError) as refused:
        make_plan(SEVEN, tight, context=2048, batch=4, type="q5_k_m")
    # Keys and values of four texts are 4 GiB: half of them, or half of the texts, are enough.
    assert [change for change, _ in refused.value.nearest if "type" not in change] == [
        "an int8 cache",
        "a context of 1024",
        "a batch of 2",
    ]
    for change, plan in refused.value.nearest:
        assert not lacking(plan, model_sizes(SEVEN, plan.type)), change
        assert plan.batch == (2 if "batch" in change else 4)
    explicit = Plan((StagePlan(range(32), ("cpu:0",)),), tight, 2048, 4, type="q5_k_m")
    with pytest.raises(InfeasibleError, match="cpu:0 lacks"):
        check_plan(explicit, SEVEN)
    fits = dataclasses.replace(explicit, batch=1, type="q2_k", context=256)
    assert check_plan(fits, SEVEN) is fits


def test_a_quantized_file_has_no_fewer_bits_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "q8.gguf"
    qjax.convert(EMBEDDED, path, quantize="q8_0")
    source = open_source(path)
    held = model_sizes(source).weights(0, 6, "cpu")
    with pytest.raises(QjaxError, match="quantized already"):
        model_sizes(source, "q4_0")
    devices = (make_device("cpu:0", held),)
    with pytest.raises(InfeasibleError, match="a file of type q") as refused:
        make_plan(source, devices, context=64)
    assert all(plan.type is None for _, plan in refused.value.nearest)


@pytest.mark.parametrize(
    ("ratio", "first", "layers"),
    [
        ((1, 1), 2000, [3, 3]),
        ((3, 1), 2000, [4, 2]),
        ((1, 3), 2000, [1, 5]),
        ((1, 0), 2000, [6]),
        ((0, 1), 2000, [6]),
        ((1, 1), 10000, [1, 5]),
    ],
)
def test_layers_by_a_ratio_of_their_bytes(ratio: tuple[int, ...], first: int, layers: list[int]) -> None:
    costs = Costs(uneven(ONE, [first, 2000, 2000, 2000, 2000, 2000]), 64, 1)
    found = stages_by_ratio(costs, ratio, (make_device("cpu:0", 1), make_device("cpu:1", 1)))
    assert [len(stage.layers) for stage in found] == layers
    assert found[0].devices == ("cpu:1" if ratio[0] == 0 else "cpu:0",)


def test_ratios_and_contexts_that_are_none() -> None:
    assert parse_ratio("ratio 3:1", 2) == parse_ratio("3:1", 2) == (3, 1)
    for text in ("", "ratio", "3:-1", "3:x", "one 3:1", "3:1:1", "3", "0:0", "9999999999:1"):
        with pytest.raises(QjaxError, match="expected a"):
            parse_ratio(text, 2)
    devices = (make_device("cpu:0", 40 * GIB),)
    with pytest.raises(QjaxError, match="context of 1 to the model's 4096, got 4097"):
        make_plan(SEVEN, devices, context=4097)
    with pytest.raises(QjaxError, match="known are f32"):
        make_plan(SEVEN, devices, type="q9")
    with pytest.raises(QjaxError, match="at least one device"):
        make_plan(SEVEN, ())
    with pytest.raises(QjaxError, match="cannot be cut into 2 microbatches"):
        make_plan(SEVEN, devices, microbatches=2)


def test_streamed_layers_need_a_host() -> None:
    stages = (StagePlan(range(22), ("cuda:0",), streamed=True),)
    sizes = model_sizes(ONE, "q8_0")
    alone = Plan(stages, parse_devices("cuda:0=2GiB"), 512)
    with pytest.raises(QjaxError, match="name a cpu"):
        report(alone, sizes)
    made = report(Plan(stages, parse_devices("cuda:0=2GiB,cpu:0=2GiB"), 512), sizes)
    gpu, cpu = made.uses
    assert cpu.host == cpu.used == sizes.weights(1, 24, "host")
    # The embedding, and room for the two largest.
    head_bytes = sizes.weights(23, 24, "cuda")
    assert gpu.held.weights == sizes.weights(0, 1, "cuda") + 2 * head_bytes
    assert made.moved > cpu.host
    assert "streaming" in made.limits
    assert np.isclose(made.tokens_per_second, 1 / (cpu.host / make_device("cuda:0", 1).link), rtol=0.01)


def test_devices_of_a_mesh_work_together() -> None:
    sizes = model_sizes(ONE, "q8_0")
    device = lambda name: Device(name, 4 * GIB, 1e10, 1e13, 1e12, 0.0)
    one = Plan((StagePlan(range(22), ("cpu:0",)),), (device("cpu:0"),), 512)
    two = Plan((StagePlan(range(22), ("cpu:0", "cpu:1")),), (device("cpu:0"), device("cpu:1")), 512)
    factor = report(two, sizes).tokens_per_second / report(one, sizes).tokens_per_second
    assert factor == pytest.approx(2, rel=0.01)


def test_microbatches_overlap() -> None:
    sizes = model_sizes(ONE, "q8_0")
    devices = tuple(Device(name, 4 * GIB, 1e10, 1e13, 1e12, 0.0) for name in ("cpu:0", "cpu:1"))
    stages = (StagePlan(range(12), ("cpu:0",)), StagePlan(range(12, 22), ("cpu:1",)))
    speed = lambda n: report(Plan(stages, devices, 256, 2, n), sizes).tokens_per_second
    # Half of the texts at a time, in both stages at once.
    assert 0.9 < speed(2) / speed(1) < 1.1
    on_one = tuple(dataclasses.replace(stage, devices=("cpu:0",)) for stage in stages)
    assert report(Plan(on_one, devices, 256, 2, 2), sizes).tokens_per_second < 0.6 * speed(2)
