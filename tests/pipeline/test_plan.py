"""What a plan may be, and the texts that devices are named by."""

from typing import Any

import pytest

from qjax.errors import QjaxError
from qjax.pipeline import Device, Plan, StagePlan
from qjax.pipeline.devices import KINDS, device_name, make_device, parse_devices, parse_rate

GPU, CPU, CPU1 = (make_device(name, 1 << 30) for name in ("cuda:0", "cpu:0", "cpu:1"))


def test_devices_of_a_text() -> None:
    found = parse_devices(" cuda:0=8GiB@900GB/s, CPU=1.5GB")
    assert [device.name for device in found] == ["cuda:0", "cpu:0"]
    assert [device.memory for device in found] == [8 << 30, 1_500_000_000]
    assert [device.kind for device in found] == ["cuda", "cpu"]
    assert found[0].bandwidth == 900e9
    assert found[0].link == KINDS["cuda"].link
    assert found[1].bandwidth == KINDS["cpu"].bandwidth
    assert parse_rate("1 MiB/s") == 1 << 20
    assert device_name("tpu:07") == "tpu:7"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected NAME=SIZE"),
        ("cuda:0", "expected NAME=SIZE"),
        ("cuda:0=8GiB,", "expected NAME=SIZE"),
        ("cuda:0=-8GiB", "expected a size"),
        ("cuda:0=nan", "expected a size"),
        ("cuda:0=" + "9" * 30 + "T", "expected a memory"),
        ("cuda:0=1@fast", "expected a rate"),
        ("cuda:0=1@-1GB/s", "expected a rate"),
        ("cuda:0=1@" + "9" * 30 + "T", "expected a bandwidth"),
        ("abacus:0=1", "expected a device"),
        ("cuda:x=1", "expected a device"),
        ("cuda:99999=1", "expected a device"),
        ("cpu=1,cpu:0=2", "named twice"),
    ],
)
def test_texts_that_name_no_devices(text: str, said: str) -> None:
    with pytest.raises(QjaxError, match=said):
        parse_devices(text)


@pytest.mark.parametrize(
    "changed",
    [
        {"memory": 0},
        {"memory": -1},
        {"bandwidth": float("nan")},
        {"bandwidth": -2.0},
        {"link": float("inf")},
        {"flops": 0.0},
        {"latency": -1.0},
        {"latency": float("nan")},
    ],
)
def test_devices_that_are_none(changed: dict[str, Any]) -> None:
    good = {"memory": 1, "bandwidth": 1e9, "flops": 1e9, "link": 1e9, "latency": 0.0}
    Device("cpu:0", **good)
    with pytest.raises(QjaxError, match="device cpu:0: expected a"):
        Device("cpu:0", **{**good, **changed})


def test_a_plan() -> None:
    stages = (StagePlan(range(2), ("cuda:0",)), StagePlan(range(2, 5), ("cpu:0",)), StagePlan(range(5, 5), ("cuda:0",)))
    plan = Plan(stages, (GPU, CPU), context=128, batch=5, microbatches=2)
    assert plan.layers == 5
    assert plan.rows == 3
    assert plan.device("cpu:0") is CPU
    assert hash(plan) == hash(Plan(stages, (GPU, CPU), 128, 5, 2))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((), "at least one stage"),
        ([((0, 2), "cpu:0"), ((3, 4), "cuda:0")], "stage 1: layers 2 to 2 are missing"),
        ([((1, 2), "cpu:0")], "layers 0 to 0 are missing"),
        ([((0, 3), "cpu:0"), ((1, 4), "cuda:0")], "layers 1 to 2 are placed twice"),
        ([((0, 0), "cpu:0"), ((0, 0), "cuda:0"), ((0, 2), "cpu:1")], "stage 1: expected a range"),
        ([((0, 2), "cpu:7")], "device cpu:7 is not one of cuda:0, cpu:0, cpu:1"),
        ([((0, 2), "cpu:0", "cpu:0")], "each once"),
        ([((0, 2), "cpu:0", "cuda:0")], "several kinds"),
        ([((0, 2),)], "got none"),
        ([((2, 0), "cpu:0")], "expected a range"),
    ],
)
def test_stages_that_are_no_plan(stages: Any, said: str) -> None:
    made = tuple(
        StagePlan(range(*layers), devices) for layers, *devices in map(tuple, stages) for devices in [tuple(devices)]
    )
    with pytest.raises(QjaxError, match=said):
        Plan(made, (GPU, CPU, CPU1), context=8)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"context": 0}, "context"),
        ({"batch": -1}, "batch"),
        ({"batch": 1 << 40}, "batch"),
        ({"microbatches": 2}, "cannot be cut into 2"),
        ({"devices": (CPU, CPU)}, "named twice"),
        ({"stages": (StagePlan(range(2), ("cpu:0",), streamed=True),)}, "streamed to one accelerator"),
    ],
)
def test_numbers_that_are_no_plan(changed: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"stages": (StagePlan(range(2), ("cpu:0",)),), "devices": (CPU,), "context": 8}
    Plan(**good)
    with pytest.raises(QjaxError, match=said):
        Plan(**{**good, **changed})
