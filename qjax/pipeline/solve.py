"""The fastest placement of a row of units on devices: dynamic programming over the cuts between stages.

best[used][j] is the least time of the units before j on the devices `used` (how many of each kind of equal devices, in
any order); a device more takes the units i to j - 1:

    best[used + k][j] = min over i of best[used][i] + seconds[k][i, j]

A device that cannot hold all of its units may have the last of them streamed from the host's memory, which then serves
nothing else. Not searched: meshes, and more than one stage on a device but for that.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from qjax.pipeline.costs import Costs, together
from qjax.pipeline.devices import Device
from qjax.pipeline.plan import StagePlan

Objective = Literal["latency", "throughput"]
# With more ways than this to have used some of each kind, devices are tried in the given order alone.
MOST_STATES = 4096


class Segment(NamedTuple):
    """The units start to stop - 1 on a device; from `resident` on they are streamed."""

    start: int
    stop: int
    resident: int
    device: Device


class Solution(NamedTuple):
    """seconds of a step: of all stages one after the other, or with microbatches of the whole batch."""

    seconds: float
    segments: tuple[Segment, ...]
    microbatches: int


class _Kind(NamedTuple):
    """Equal devices, with the seconds that one takes for the units i to j - 1 (infinite if it has no room), and from
    which unit on they are streamed."""

    devices: tuple[Device, ...]
    seconds: np.ndarray
    resident: np.ndarray


def solve(
    costs: Costs, devices: Sequence[Device], objective: Objective = "latency", microbatches: int | None = None
) -> Solution | None:
    """The fastest feasible placement, None if there is none.

    Args:
      costs: its `microbatches` do not matter. microbatches: how many, None for as many as serve the objective.
      objective: "latency" makes the sum of the stages' seconds least; "throughput" the seconds of a step whose
        microbatches overlap: all of them in the slowest stage, but no less than one of them in all stages.
    """
    # Whatever is placed where, all of it is somewhere.
    least = costs.held(0, costs.units, "host")
    if least.weights + least.cache > sum(device.memory for device in devices):
        return None
    if microbatches is not None:
        counts = [microbatches]
    else:
        counts = range(1, min(costs.batch, len(devices)) + 1) if objective == "throughput" else [1]
    found: Solution | None = None
    for count in counts:
        cut = dataclasses.replace(costs, microbatches=count)
        for kinds in _choices(cut, devices):
            best = _least_period(kinds, count) if objective == "throughput" else _least_sum(kinds)
            if best is not None and (found is None or best[0] < found.seconds):
                found = Solution(best[0], best[1], count)
    return found


def stage_plans(segments: Sequence[Segment], units: int) -> tuple[StagePlan, ...]:
    """The stages of segments of a row of so many units."""
    plans = []
    for start, stop, resident, device in segments:
        for first, last, streamed in ((start, resident, False), (resident, stop, True)):
            if first < last:
                layers = range(max(first, 1) - 1, min(last, units - 1) - 1)
                plans.append(StagePlan(layers, (device.name,), streamed))
    return tuple(plans)


def segment_seconds(costs: Costs, segment: Segment) -> float:
    """Of one decode step of a microbatch."""
    start, stop, resident, device = segment
    kept = costs.seconds(start, resident, (device,)).total if start < resident else 0.0
    rest = costs.seconds(resident, stop, (device,), streamed=True).total if resident < stop else 0.0
    return kept + rest


def segment_fits(costs: Costs, segment: Segment) -> bool:
    """Whether the device has room; of the host's memory nothing is asked."""
    start, stop, resident, device = segment
    parts = [(start, resident, False)] * (start < resident) + [(resident, stop, True)] * (resident < stop)
    return together([costs.held(a, b, device.kind, streamed=s) for a, b, s in parts]).total <= device.memory


def _choices(costs: Costs, devices: Sequence[Device]) -> list[list[_Kind]]:
    """The kinds of devices: none streamed to, or all but the host with one device streamed to."""
    groups: dict[Any, list[Device]] = {}
    for device in devices:
        groups.setdefault((device.kind, dataclasses.replace(device, name="cpu:0")), []).append(device)
    plain = [_kind(costs, tuple(group)) for group in groups.values()]
    if _ways(plain) > MOST_STATES:
        # One by one, in the given order.
        of = {device.name: kind for kind in plain for device in kind.devices}
        plain = [of[device.name]._replace(devices=(device,)) for device in devices]
    choices = [plain]
    host = next((device for device in devices if device.kind == "cpu"), None)
    for at, kind in enumerate(plain):
        if host is None or kind.devices[0].kind == "cpu":
            continue
        streamed = _kind(costs, kind.devices[:1], host.memory)
        if (streamed.resident < _none_streamed(costs.units)).any():
            rest = [k._replace(devices=tuple(d for d in k.devices if d is not host)) for k in plain]
            rest[at] = kind._replace(devices=kind.devices[1:])
            choices.append([k for k in (*rest[:at], streamed, *rest[at:]) if k.devices])
    return choices


def _ways(kinds: list[_Kind]) -> int:
    return math.prod(len(kind.devices) + 1 for kind in kinds)


def _none_streamed(units: int) -> np.ndarray:
    return np.broadcast_to(np.arange(units + 1), (units + 1, units + 1))


def _kind(costs: Costs, devices: tuple[Device, ...], host: int | None = None) -> _Kind:
    """A kind of devices; `host`: its memory, if units may be streamed from there."""
    size, device = costs.units + 1, devices[0]
    seconds, resident = np.full((size, size), math.inf), np.array(_none_streamed(costs.units))
    for start in range(size):
        most = size
        for stop in range(start + 1, size):
            segment = Segment(start, stop, stop, device)
            if most < size or not segment_fits(costs, segment):
                # With more units, no more of them stay.
                found = None if host is None else _most_resident(costs, segment, host, most)
                if found is None:
                    break
                segment, most = found, found.resident
            seconds[start, stop] = segment_seconds(costs, segment)
            resident[start, stop] = segment.resident
    return _Kind(devices, seconds, resident)


def _most_resident(costs: Costs, segment: Segment, host: int, most: int) -> Segment | None:
    """The segment with as many of its first units on the device as it has room for, the rest in the host's memory."""
    start, stop = segment.start, segment.stop
    # The embedding lies on the device in any case: alone it is no stage.
    for resident in (*range(min(stop - 1, most), max(start, 1), -1), start):
        found = segment._replace(resident=resident)
        if costs.host(resident, stop) > host:
            return None
        if segment_fits(costs, found):
            return found
    return None


def _least_sum(kinds: list[_Kind], limit: float = math.inf) -> tuple[float, tuple[Segment, ...]] | None:
    """Least sum of seconds of stages that take no longer than the limit each."""
    times = [np.where(kind.seconds <= limit, kind.seconds, math.inf) for kind in kinds]
    counts = [len(kind.devices) for kind in kinds]
    in_order = _ways(kinds) > MOST_STATES
    if in_order:
        states: Any = [(1,) * k + (0,) * (len(kinds) - k) for k in range(len(kinds) + 1)]
    else:
        states = list(itertools.product(*(range(count + 1) for count in counts)))
    size = times[0].shape[0]
    best: dict[tuple[int, ...], np.ndarray] = {}
    came: dict[tuple[int, ...], list[tuple[int, int] | None]] = {}
    for state in states:
        least, back = np.full(size, math.inf), [None] * size
        if not any(state):
            least[0] = 0.0
        elif in_order:
            # The device may be left out.
            before = state[: sum(state) - 1] + (0,) * (len(kinds) - sum(state) + 1)
            least, back = best[before].copy(), list(came[before])
        for k in range(len(kinds)):
            before = (*state[:k], state[k] - 1, *state[k + 1 :])
            if before not in best:
                continue
            sums = best[before][:, None] + times[k]
            at, found = sums.argmin(axis=0), sums.min(axis=0)
            for j in np.flatnonzero(found < least):
                least[j], back[j] = found[j], (k, int(at[j]))
        best[state], came[state] = least, back
    end = min(states, key=lambda state: best[state][-1])
    if not math.isfinite(best[end][-1]):
        return None
    return float(best[end][-1]), _traced(kinds, came, end, size - 1, in_order)


def _traced(kinds: list[_Kind], came: Any, state: tuple[int, ...], stop: int, in_order: bool) -> tuple[Segment, ...]:
    """The segments that led to a state and a cut."""
    taken: list[tuple[int, int, int]] = []
    while stop > 0:
        k, start = came[state][stop]
        taken.append((k, start, stop))
        stop = start
        state = (1,) * k + (0,) * (len(kinds) - k) if in_order else (*state[:k], state[k] - 1, *state[k + 1 :])
    left = [iter(kind.devices) for kind in kinds]
    return tuple(
        Segment(start, stop, int(kinds[k].resident[start, stop]), next(left[k])) for k, start, stop in reversed(taken)
    )


def _least_period(kinds: list[_Kind], count: int) -> tuple[float, tuple[Segment, ...]] | None:
    """Least seconds of a step of `count` microbatches, max(count * slowest stage, sum of the stages).

    The least sum under a limit falls as the limit grows: the best limit is where count * limit meets it.
    """
    found = _least_sum(kinds)
    if found is None or count == 1:
        return found
    every = np.concatenate([kind.seconds.ravel() for kind in kinds])
    limits = np.unique(every[np.isfinite(every)])
    low, high = 0, len(limits) - 1
    best = _period(kinds, count, found[1]), found[1]
    while low <= high:
        middle = (low + high) // 2
        found = _least_sum(kinds, limits[middle])
        if found is not None and (period := _period(kinds, count, found[1])) < best[0]:
            best = period, found[1]
        if found is None or found[0] > count * limits[middle]:
            low = middle + 1
        else:
            high = middle - 1
    return best


def _period(kinds: list[_Kind], count: int, segments: tuple[Segment, ...]) -> float:
    table = {device.name: kind for kind in kinds for device in kind.devices}
    times = [float(table[s.device.name].seconds[s.start, s.stop]) for s in segments]
    return max(count * max(times), sum(times))
