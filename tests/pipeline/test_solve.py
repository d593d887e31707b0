"""The fastest placement: as good as the best of all, nothing placed twice, nothing over its memory."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.evaluate.shapes import llama
from qjax.pipeline.costs import Costs
from qjax.pipeline.devices import Device
from qjax.pipeline.solve import Segment, Solution, segment_fits, segment_seconds, solve, stage_plans

from .conftest import uneven

CONFIG = llama(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=1024)
quick = settings(max_examples=30)


def made(layer_bytes: list[int], batch: int = 1, *, tied: bool = False) -> Costs:
    return Costs(uneven(CONFIG, layer_bytes, tied=tied), context=64, batch=batch)


sizes = st.lists(st.integers(1, 40).map(lambda n: n * 100_000), min_size=1, max_size=4)
# Activations, workspace and cache take about 0.7 MB here.
memories = st.sampled_from([900_000, 1_500_000, 2_500_000, 4_000_000, 9_000_000, 30_000_000])
speeds = st.sampled_from([1e9, 3e9, 2e10])


@st.composite
def device_lists(draw: Any, most: int = 3) -> list[Device]:
    names = draw(
        st.lists(st.sampled_from(["cpu:0", "cuda:0", "cuda:1", "tpu:0"]), min_size=1, max_size=most, unique=True)
    )
    return [
        Device(n, draw(memories), draw(speeds), 1e11, draw(speeds), draw(st.sampled_from([0.0, 1e-4]))) for n in names
    ]


def everything(costs: Costs, devices: list[Device]) -> list[tuple[Segment, ...]]:
    """Every feasible placement in the solver's space, one by one."""
    found = []
    fits = functools.cache(lambda segment: segment_fits(costs, segment))
    host = next((device for device in devices if device.kind == "cpu"), None)
    for count in range(1, min(len(devices), costs.units) + 1):
        for order in itertools.permutations(devices, count):
            for cuts in itertools.combinations(range(1, costs.units), count - 1):
                borders = [0, *cuts, costs.units]
                plain = tuple(Segment(a, b, b, d) for a, b, d in zip(borders, borders[1:], order, strict=False))
                if all(fits(segment) for segment in plain):
                    found.append(plain)
                if host is None or host in order:
                    continue
                for k, (start, stop, _, device) in enumerate(plain):
                    # Alone on a device the embedding is no stage.
                    for resident in [start, *range(max(start, 1) + 1, stop)]:
                        one = Segment(start, stop, resident, device)
                        segments = (*plain[:k], one, *plain[k + 1 :])
                        room = costs.host(resident, stop) <= host.memory
                        if room and all(fits(segment) for segment in segments):
                            found.append(segments)
    return found


def least(costs: Costs, devices: list[Device], count: int) -> float:
    """Seconds of a step of so many microbatches, of the best of all."""
    costs = dataclasses.replace(costs, microbatches=count)
    seconds = functools.cache(lambda segment: segment_seconds(costs, segment))
    times = ([seconds(segment) for segment in segments] for segments in everything(costs, devices))
    return min((max(count * max(each), sum(each)) for each in times), default=math.inf)


@quick
@given(sizes, device_lists(), st.booleans())
def test_latency_is_that_of_the_best_of_all(layer_bytes: list[int], devices: list[Device], tied: bool) -> None:
    costs = made(layer_bytes, tied=tied)
    found = solve(costs, devices)
    assert (math.inf if found is None else found.seconds) == pytest.approx(least(costs, devices, 1), rel=1e-9)


@quick
@given(sizes, device_lists(), st.integers(1, 4), st.none() | st.integers(1, 4))
def test_throughput_is_that_of_the_best_of_all(
    layer_bytes: list[int], devices: list[Device], batch: int, asked: int | None
) -> None:
    costs = made(layer_bytes, batch)
    asked = None if asked is None else min(asked, batch)
    found = solve(costs, devices, "throughput", asked)
    counts = [asked] if asked is not None else range(1, min(batch, len(devices)) + 1)
    best = min(least(costs, devices, count) for count in counts)
    assert (math.inf if found is None else found.seconds) == pytest.approx(best, rel=1e-9)


def check(costs: Costs, found: Solution) -> None:
    costs = dataclasses.replace(costs, microbatches=found.microbatches)
    at = 0
    for segment in found.segments:
        assert segment.start == at
        assert segment_fits(costs, segment)
        at = segment.stop
    assert at == costs.units
    assert len({segment.device.name for segment in found.segments}) == len(found.segments)
    stages = stage_plans(found.segments, costs.units)
    assert [layer for stage in stages for layer in stage.layers] == list(range(costs.units - 2))


@quick
@given(sizes, device_lists(4), st.sampled_from(["latency", "throughput"]), st.integers(1, 3), st.data())
def test_more_memory_is_never_slower(
    layer_bytes: list[int], devices: list[Device], objective: Any, batch: int, data: st.DataObject
) -> None:
    costs = made(layer_bytes, batch)
    before = solve(costs, devices, objective)
    at = data.draw(st.integers(0, len(devices) - 1))
    more = dataclasses.replace(devices[at], memory=devices[at].memory + data.draw(memories))
    after = solve(costs, [*devices[:at], more, *devices[at + 1 :]], objective)
    if before is not None:
        check(costs, before)
        assert after is not None
        assert after.seconds <= before.seconds * (1 + 1e-12)


def test_many_devices_are_taken_in_their_order() -> None:
    costs = made([1_000_000] * 14)
    devices = [Device(f"cpu:{i}", 2_500_000 + i, 1e9, 1e11, 1e9, 1e-5) for i in range(16)]
    found = solve(costs, devices)
    assert found is not None
    check(costs, found)
    order = [int(segment.device.name[4:]) for segment in found.segments]
    assert order == sorted(order)
    # Equal ones need not be told apart.
    equal = [dataclasses.replace(device, memory=2_500_000) for device in devices]
    same = solve(costs, equal)
    assert same is not None
    assert same.seconds == pytest.approx(found.seconds)


def test_streaming_is_chosen_by_the_link_against_the_cpu() -> None:
    """What does not fit stays on the CPU where that reads faster than the link brings, else it is streamed."""
    costs = made([1_000_000] * 8)
    gpu = Device("cuda:0", 13_000_000, 1e12, 1e13, 1e9, 1e-6)
    cpu = Device("cpu:0", 60_000_000, 1e8, 1e13, 1e12, 1e-6)
    slow, fast = (solve(costs, [gpu, dataclasses.replace(cpu, bandwidth=rate)]) for rate in (1e8, 1e10))
    assert slow is not None
    assert fast is not None
    [streamed] = slow.segments
    assert streamed.device == gpu
    assert 2 < streamed.resident < costs.units
    assert [stage.streamed for stage in stage_plans(slow.segments, costs.units)] == [False, True]
    assert {segment.device.name for segment in fast.segments} == {"cuda:0", "cpu:0"}
    assert all(segment.resident == segment.stop for segment in fast.segments)
    assert solve(costs, [gpu]) is None
