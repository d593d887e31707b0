"""What a plan comes to: bytes used and free on each device, predicted speed, and the most that fits."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from qjax.errors import QjaxError
from qjax.pipeline.costs import FLOAT, Costs, Held, Seconds, costs_of, together, units_of
from qjax.pipeline.devices import Device
from qjax.pipeline.plan import Plan
from qjax.pipeline.sizes import ModelSizes
from qjax.pipeline.tensor_parallel import local_config

T = TypeVar("T")
# Larger batches are no question of memory.
MOST_BATCH = 1 << 20


@dataclasses.dataclass(frozen=True)
class DeviceUse:
    """A device's part in a plan.

    Attributes:
      units: what lies there: "token_embd, layers 0-15".
      held: bytes of weights, of keys and values, and of activations with workspace and margin.
      host: bytes of its memory that hold what is streamed to others.
      seconds: that it works in a decode step of all microbatches. share: of the step's seconds, if stages take turns.
    """

    device: Device
    units: str
    held: Held
    host: int
    seconds: float
    share: float

    @property
    def used(self) -> int:
        return self.held.total + self.host

    @property
    def free(self) -> int:
        """Negative: what lacks."""
        return self.device.memory - self.used


@dataclasses.dataclass(frozen=True)
class Report:
    """What a plan comes to.

    Attributes:
      uses: of each device, in the plan's order.
      tokens_per_second: of decoding, of all texts together, with full caches.
      moved: bytes that travel over links for a token.
      largest_batch: that fits at the plan's context, 0 if none does; largest_context: at the plan's batch, no more than
        the model has. Both with the plan's stages.
      limits: what a larger batch has no room on, and what the time goes to.
    """

    plan: Plan
    uses: tuple[DeviceUse, ...]
    tokens_per_second: float
    moved: float
    largest_batch: int
    largest_context: int
    limits: str

    @property
    def lacks(self) -> dict[str, int]:
        """Bytes that lack, by device; empty for a plan that is feasible."""
        return {use.device.name: -use.free for use in self.uses if use.free < 0}


class InfeasibleError(QjaxError):
    """A plan has no room. `report` says what lacks; `nearest` are plans that have room: (what is changed, plan)."""

    def __init__(self, text: str, report: Report, nearest: tuple[tuple[str, Plan], ...]) -> None:
        super().__init__(text)
        self.report, self.nearest = report, nearest


def held_by(plan: Plan, sizes: ModelSizes) -> dict[str, tuple[Held, int]]:
    """What each device holds, and what it holds as the host of streamed units.

    Raises:
      QjaxError: units are streamed and no cpu is there to hold them, or the model has other layers.
    """
    costs = _checked(plan, sizes)
    held: dict[str, list[Held]] = {device.name: [] for device in plan.devices}
    hosted = 0
    for stage, (start, stop) in zip(plan.stages, units_of(plan), strict=True):
        kind = stage.devices[0].partition(":")[0]
        mine = costs.held(start, stop, kind, len(stage.devices), streamed=stage.streamed)
        hosted += costs.host(start, stop) if stage.streamed else 0
        for name in stage.devices:
            held[name].append(mine)
    first, last = plan.stages[0], plan.stages[-1]
    if sizes.tied and len(plan.stages) > 1 and first.devices == last.devices and not last.streamed:
        # One array serves both ends.
        shared = sizes.weights(0, 1, first.devices[0].partition(":")[0], len(first.devices))
        for name in first.devices:
            held[name].append(Held(-shared, 0, 0))
    host = next((device.name for device in plan.devices if device.kind == "cpu"), None)
    if hosted and host is None:
        raise QjaxError("streamed layers lie in the host's memory: name a cpu among the devices, with its memory")
    return {name: (together(parts), hosted if name == host else 0) for name, parts in held.items()}


def lacking(plan: Plan, sizes: ModelSizes) -> dict[str, int]:
    """Bytes that lack, by device; empty for a plan that is feasible."""
    found = {}
    for name, (held, host) in held_by(plan, sizes).items():
        free = plan.device(name).memory - held.total - host
        if free < 0:
            found[name] = -free
    return found


def report(plan: Plan, sizes: ModelSizes) -> Report:
    """What a plan comes to, feasible or not.

    Raises:
      QjaxError: see `held_by`.
    """
    costs, held = _checked(plan, sizes), held_by(plan, sizes)
    units = units_of(plan)
    seconds = [
        costs.seconds(*mine, tuple(map(plan.device, stage.devices)), streamed=stage.streamed)
        for stage, mine in zip(plan.stages, units, strict=True)
    ]
    busy = {device.name: 0.0 for device in plan.devices}
    for stage, time in zip(plan.stages, seconds, strict=True):
        for name in stage.devices:
            busy[name] += time.total
    alone = sum(time.total for time in seconds)
    # Microbatches overlap, but not on a device.
    step = max(plan.microbatches * max(busy.values()), alone)
    uses = tuple(
        DeviceUse(
            device,
            _units_on(plan, device.name),
            *held[device.name],
            plan.microbatches * busy[device.name],
            busy[device.name] / alone,
        )
        for device in plan.devices
    )
    moved = sum(
        (costs.host(*mine) / costs.rows if stage.streamed else 0.0)
        for stage, mine in zip(plan.stages, units, strict=True)
    )
    moved += (len(plan.stages) - 1) * FLOAT * sizes.config.hidden + 2 * FLOAT
    batch, _ = largest(lambda n: not lacking(_with_batch(plan, n), sizes), MOST_BATCH)
    context, _ = largest(lambda n: not lacking(dataclasses.replace(plan, context=n), sizes), sizes.config.context)
    limits = _limits(plan, sizes, seconds, batch)
    return Report(plan, uses, plan.batch / step, moved, batch, context, limits)


def _checked(plan: Plan, sizes: ModelSizes) -> Costs:
    if plan.layers != sizes.config.layers:
        raise QjaxError(f"the plan places {plan.layers} layers, {sizes.name} has {sizes.config.layers}")
    for stage in plan.stages:
        try:
            local_config(sizes.config, len(stage.devices))
        except QjaxError as error:
            raise QjaxError(f"{', '.join(stage.devices)}: {error}") from error
    return costs_of(plan, sizes)


def _with_batch(plan: Plan, batch: int) -> Plan:
    return dataclasses.replace(plan, batch=batch, microbatches=min(plan.microbatches, batch))


def largest(fits: Callable[[int], T], most: int) -> tuple[int, T | None]:
    """The largest number up to `most` that fits, and what `fits` gave for it; 0 and None if 1 does not.

    What is less fits too.
    """
    low, high, best = 0, most + 1, None
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        low, high, best = (middle, high, found) if found else (low, middle, best)
    return low, best


def _limits(plan: Plan, sizes: ModelSizes, seconds: list[Seconds], batch: int) -> str:
    slowest = max(range(len(seconds)), key=lambda k: seconds[k].total)
    what = {
        "memory": "reading weights and cache",
        "arithmetic": "arithmetic",
        "link": "streaming weights over the link",
        "hops": "hops between devices",
    }[seconds[slowest].bound]
    time = f"time: {what} on {', '.join(plan.stages[slowest].devices)}"
    if batch >= MOST_BATCH:
        return time
    full = lacking(_with_batch(plan, batch + 1), sizes)
    return f"memory: {', '.join(full)} full first; {time}"


def _units_on(plan: Plan, name: str) -> str:
    """ "token_embd, layers 0-15" """
    found, last = [], len(plan.stages) - 1
    for k, stage in enumerate(plan.stages):
        if name not in stage.devices:
            continue
        found += ["token_embd"] if k == 0 else []
        if stage.layers:
            first, end = stage.layers[0], stage.layers[-1]
            text = f"layer {first}" if first == end else f"layers {first}-{end}"
            text += " streamed" if stage.streamed else ""
            found.append(text + (f" 1/{len(stage.devices)}" if len(stage.devices) > 1 else ""))
        found += ["output"] if k == last else []
    return ", ".join(found) or "nothing"
