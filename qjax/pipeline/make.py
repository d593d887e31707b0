"""A plan for a model and devices: the fastest, or by a ratio; or what lacks, and the nearest plans that have room."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from qjax.errors import QjaxError
from qjax.formats.source import Source
from qjax.kernels import Activations
from qjax.models import CacheKind, ModelConfig
from qjax.models.slots import SLOT_UNIT
from qjax.pipeline.costs import Costs, costs_of
from qjax.pipeline.devices import Device
from qjax.pipeline.plan import Plan, StagePlan
from qjax.pipeline.report import InfeasibleError, lacking, largest, report
from qjax.pipeline.sizes import ModelSizes, model_sizes
from qjax.pipeline.solve import Objective, Segment, segment_fits, solve, stage_plans

# What fewer bits are looked for among.
SMALLER_TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
DEFAULT_CONTEXT = 4096
# place(costs) gives stages and microbatches, None if nothing has room.
Place = Callable[[Costs], tuple[tuple[StagePlan, ...], int] | None]


def make_plan(
    model: Source | ModelConfig,
    devices: Sequence[Device],
    *,
    context: int | None = None,
    batch: int = 1,
    type: str | None = None,
    mode: str = "auto",
    objective: Objective = "latency",
    microbatches: int | None = None,
    cache: CacheKind = "float",
    activations: Activations | None = None,
    name: str | None = None,
) -> Plan:
    """A plan that has room, by headers alone.

    Args:
      model: an open file or folder, or the config of a model (float16).
      context: tokens of each text, prompt included; None for 4096, or the model's if that is less.
      type: what float matrices are quantized to while they are loaded.
      mode: "auto" for the fastest, or a ratio such as "3:1" of the layers' bytes, device by device.
      objective: of "auto"; see `solve`. microbatches: None for one, or as many as serve the throughput.
      name: of the model, for messages.

    Raises:
      InfeasibleError: nothing has room; says what lacks and what would.
      QjaxError: numbers out of range, or see `model_sizes`.
    """
    sizes = model_sizes(model, type, name=name)
    if not devices:
        raise QjaxError("a plan needs at least one device")
    if objective not in get_args(Objective):
        raise QjaxError(f"expected an objective of {get_args(Objective)}, got {objective!r}")
    if mode == "auto":
        place = _fastest(devices, objective, microbatches)
    else:
        place = _by_ratio(parse_ratio(mode, len(devices)), devices, microbatches or 1)
    wanted = Plan(
        # Until stages are found.
        (StagePlan(range(sizes.config.layers), (devices[0].name,)),),
        tuple(devices),
        checked_context(sizes.config, context),
        batch,
        min(microbatches or 1, batch) if microbatches is None else microbatches,
        cache,
        activations,
        type,
    )
    found = _placed(wanted, sizes, place)
    if found is None or lacking(found, sizes):
        raise _infeasible(found or _filled(wanted, sizes), model, sizes, place)
    return found


def check_plan(
    plan: Plan, model: Source | ModelConfig, *, name: str | None = None, packed: Mapping[str, int] | None = None
) -> Plan:
    """The plan itself if it has room.

    Args:
      packed: see `model_sizes`.

    Raises:
      InfeasibleError: it has not; says what lacks and what would have room with these stages.
      QjaxError: the model has other layers.
    """
    sizes = model_sizes(model, plan.type, name=name, packed=packed)
    checked_context(sizes.config, plan.context)
    if lacking(plan, sizes):
        raise _infeasible(plan, model, sizes, lambda costs: (plan.stages, costs.microbatches))
    return plan


def checked_context(config: ModelConfig, context: int | None) -> int:
    """The context that is wanted, by default up to 4096.

    Raises:
      QjaxError: more than the model has, or none.
    """
    if context is None:
        return min(DEFAULT_CONTEXT, config.context)
    if not 1 <= context <= config.context:
        raise QjaxError(f"expected a context of 1 to the model's {config.context}, got {context}")
    return context


def parse_ratio(text: str, devices: int) -> tuple[int, ...]:
    """The parts of "3:1" or "ratio 3:1", a number a device.

    Raises:
      QjaxError: no such ratio, or one of another number of devices.
    """
    words = text.split()
    parts = words[-1].split(":") if words and words[:-1] in ([], ["ratio"]) else []
    if not parts or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise QjaxError(f"expected a mode such as auto or ratio 3:1, got {text[:80]!r}")
    ratio = tuple(map(int, parts))
    if len(ratio) != devices or not any(ratio):
        raise QjaxError(f"expected a ratio of {devices} numbers, one a device and not all 0, got {text!r}")
    return ratio


def _placed(wanted: Plan, sizes: ModelSizes, place: Place) -> Plan | None:
    """The plan with the stages that are found for it."""
    found = place(costs_of(wanted, sizes))
    return None if found is None else dataclasses.replace(wanted, stages=found[0], microbatches=found[1])


def _fastest(devices: Sequence[Device], objective: Objective, microbatches: int | None) -> Place:
    def place(costs: Costs) -> tuple[tuple[StagePlan, ...], int] | None:
        count = None if microbatches is None else min(microbatches, costs.batch)
        found = solve(costs, devices, objective, count)
        return None if found is None else (stage_plans(found.segments, costs.units), found.microbatches)

    return place


def _by_ratio(ratio: tuple[int, ...], devices: Sequence[Device], microbatches: int) -> Place:
    def place(costs: Costs) -> tuple[tuple[StagePlan, ...], int]:
        return stages_by_ratio(costs, ratio, devices), min(microbatches, costs.batch)

    return place


def stages_by_ratio(costs: Costs, ratio: tuple[int, ...], devices: Sequence[Device]) -> tuple[StagePlan, ...]:
    """Stages whose layers' bytes stand in a ratio, as near as whole layers come to it; 0 is no stage."""
    layers = costs.units - 2
    before = list(itertools.accumulate((costs.host(i + 1, i + 2) for i in range(layers)), initial=0))
    stages, start, parts = [], 0, 0
    for part, device in zip(ratio, devices, strict=True):
        parts += part
        aim = before[-1] * parts / sum(ratio)
        stop = layers if parts == sum(ratio) else min(range(layers + 1), key=lambda i: abs(before[i] - aim))
        if part and stop > start:
            stages.append(StagePlan(range(start, stop), (device.name,)))
            start = stop
    return tuple(stages)


def _filled(wanted: Plan, sizes: ModelSizes) -> Plan:
    """A plan without room: each device takes what it has room for, the last one the rest."""
    costs, segments, start = costs_of(wanted, sizes), [], 0
    for device in wanted.devices[:-1]:
        fits = lambda stop, start=start, device=device: segment_fits(costs, Segment(start, stop, stop, device))
        stop = next((i for i in range(costs.units - 1, start, -1) if fits(i)), start)
        if stop > start:
            segments.append(Segment(start, stop, stop, device))
            start = stop
    segments.append(Segment(start, costs.units, costs.units, wanted.devices[-1]))
    return dataclasses.replace(wanted, stages=stage_plans(segments, costs.units))


def _infeasible(plan: Plan, model: Source | ModelConfig, sizes: ModelSizes, place: Place) -> InfeasibleError:
    nearest = tuple(_nearest(plan, model, sizes, place))
    made = report(plan, sizes)
    what = "; ".join(f"{name} lacks {_gib(count)}" for name, count in made.lacks.items())
    out = f"what fits: {'; or '.join(text for text, _ in nearest)}" if nearest else "nothing smaller fits either"
    return InfeasibleError(f"{sizes.name} does not fit: {what}; {out}", made, nearest)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _nearest(plan: Plan, model: Source | ModelConfig, sizes: ModelSizes, place: Place) -> Iterable[tuple[str, Plan]]:
    """Plans that have room, each with one thing changed; if there is none, one with as little changed as can be."""

    def fits(sizes: ModelSizes, **changed: object) -> Plan | None:
        wish = dataclasses.replace(plan, **changed)  # pyright: ignore[reportArgumentType]
        wish = dataclasses.replace(wish, microbatches=min(wish.microbatches, wish.batch))
        found = _placed(wish, sizes, place)
        return None if found is None or lacking(found, sizes) else found

    smaller = list(_smaller(model, sizes))
    single = _single_changes(plan, sizes, smaller, fits)
    if single:
        return single
    for least in ({"batch": 1}, {"batch": 1, "cache": "int8"}, {"batch": 1, "cache": "int8", "context": SLOT_UNIT}):
        # The same model, then ones of fewer bits.
        if least.get("context", 0) >= plan.context:
            continue
        for text, made in [("", sizes), *smaller]:
            changed = {**least, "type": made.type} if made.type != sizes.type and not sizes.quantized else least
            small = dataclasses.replace(plan, microbatches=1)
            found = fits(made, microbatches=1, **changed)
            if found is not None:
                words = [f"{key} {value}" for key, value in least.items() if getattr(small, key) != value]
                return [(" with ".join(filter(None, [text, " and ".join(words)])), found)]
    return []


def _single_changes(
    plan: Plan,
    sizes: ModelSizes,
    smaller: list[tuple[str, ModelSizes]],
    fits: Callable[..., Plan | None],
) -> list[tuple[str, Plan]]:
    found: list[tuple[str, Plan | None]] = []
    if plan.cache == "float":
        found.append(("an int8 cache", fits(sizes, cache="int8")))
    for text, made in smaller:
        kind = {} if sizes.quantized else {"type": made.type}
        if (fewer := fits(made, **kind)) is not None:
            found.append((text, fewer))
            break
    _, units = largest(lambda n: fits(sizes, context=n * SLOT_UNIT), (plan.context - 1) // SLOT_UNIT)
    if units is not None:
        found.append((f"a context of {units.context}", units))
    _, batch = largest(lambda n: fits(sizes, batch=n), plan.batch - 1)
    if batch is not None:
        found.append((f"a batch of {batch.batch}", batch))
    return [(text, made) for text, made in found if made is not None]


def _smaller(model: Source | ModelConfig, sizes: ModelSizes) -> Iterable[tuple[str, ModelSizes]]:
    """The model in types of fewer bytes, the largest first."""
    now = sizes.weights(0, len(sizes.units), "host")
    for kind in SMALLER_TYPES:
        made = model_sizes(model, kind, name=sizes.name, anew=sizes.quantized)
        if made.weights(0, len(made.units), "host") < now:
            yield (f"a file of type {kind}" if sizes.quantized else f"type {kind}"), made
