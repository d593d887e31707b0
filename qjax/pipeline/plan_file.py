"""A plan as a YAML file, read with each mistake named, and written so that it is read back as the same plan.

    devices: {"cuda:0": 8GiB, "cpu:0": {memory: 16GiB, bandwidth: 40GB/s}}
    context: 4096
    batch: 4
    place:                                # the first that fits a unit decides
      - layers 0-15: cuda:0               # each entry with layers is a stage
      - layers 16-31: [cpu:0, cpu:1]      # one mesh, with tensor parallelism
      - /output/: cuda:0                  # a regular expression, found in a unit's name
      - /blk/: {device: cuda:0, streamed: true}

Units are token_embd, blk.0 ... blk.N-1, output. token_embd is with the first layer and output with the last unless an
expression fits them. Other keys: microbatches, cache (float, int8), activations (float, int8), type.
"""

import dataclasses
import itertools
import re
import reprlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from qjax.errors import QjaxError
from qjax.formats.atomic import atomic_file
from qjax.formats.yaml_file import read_yaml
from qjax.kernels import Activations
from qjax.models import CacheKind
from qjax.models.load import MATRICES, NORMS, QK_NORMS
from qjax.pipeline.devices import Device, device_name, make_device, parse_rate
from qjax.pipeline.plan import Plan, StagePlan, check_devices
from qjax.pipeline.sizes import EMBEDDING, OUTPUT
from qjax.sizes import parse_size

KEYS = ("devices", "context", "batch", "microbatches", "cache", "activations", "type", "place")
_OF_DEVICE = ("memory", "bandwidth", "flops", "link", "latency")
_LAYERS = re.compile(r"layers?\s+(\d{1,7})(?:\s*-\s*(\d{1,7}))?", re.ASCII)
# Names are short: with an expression no longer than this none takes long, however it goes back and forth.
MOST_EXPRESSION = 64
_INSIDE = (*MATRICES, *NORMS, *QK_NORMS, "weight", "bias")


class _Rule(NamedTuple):
    """An entry of `place`: the layers it names, or the expression; where these go."""

    text: str
    layers: range | None
    expression: re.Pattern[str] | None
    devices: tuple[str, ...]
    streamed: bool

    def fits(self, unit: str) -> bool:
        if self.expression is not None:
            return self.expression.search(unit) is not None
        assert self.layers is not None
        return unit.startswith("blk.") and int(unit[4:]) in self.layers


def read_plan(path: str | Path, layers: int, **given: Any) -> Plan:
    """The plan of a YAML file for a model of so many layers.

    Args:
      given: what replaces the file's devices, context, batch, microbatches, cache, activations or type; None does not.

    Raises:
      QjaxError: the file cannot be read, or is no plan; names the file and the entry.
    """
    data = read_yaml(path)
    try:
        return _plan(data, layers, {key: value for key, value in given.items() if value is not None})
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}") from None


def write_plan(path: str | Path, plan: Plan) -> None:
    """Write a plan; `read_plan` gives the same one.

    Raises:
      QjaxError: the disk refuses.
    """
    place: list[dict[str, Any]] = []
    for k, stage in enumerate(plan.stages):
        target: Any = stage.devices[0] if len(stage.devices) == 1 else list(stage.devices)
        if stage.streamed:
            target = {"device": target, "streamed": True}
        if stage.layers:
            place.append({f"layers {stage.layers[0]}-{stage.layers[-1]}": target})
        else:
            place.append({f"/^{EMBEDDING}$/" if k == 0 else f"/^{OUTPUT}$/": target})
    numbers = ("bandwidth", "flops", "link", "latency")
    data = {
        "devices": {d.name: {"memory": d.memory, **{what: getattr(d, what) for what in numbers}} for d in plan.devices},
        **{key: getattr(plan, key) for key in ("context", "batch", "microbatches", "cache")},
        **{key: value for key in ("activations", "type") if (value := getattr(plan, key)) is not None},
        "place": place,
    }
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
    with atomic_file(path) as file:
        file.write(text.encode())


def _plan(data: dict[Any, Any], layers: int, given: dict[str, Any]) -> Plan:
    _check_keys(data, KEYS, "")
    devices = given.pop("devices", None) or _devices(data.get("devices"))
    values: dict[str, Any] = {"batch": 1, "microbatches": 1, "cache": "float"}
    for key in ("context", "batch", "microbatches"):
        if key in data:
            values[key] = _whole(data[key], key)
    for key in ("cache", "activations", "type"):
        if data.get(key) is not None:
            values[key] = _text(data[key], key)
    for key, known in (("cache", get_args(CacheKind)), ("activations", get_args(Activations))):
        if key in values and values[key] not in known:
            raise QjaxError(f"{key}: expected one of {', '.join(known)}, got {_shown(values[key])}")
    values |= given
    if "context" not in values:
        raise QjaxError("context is missing: say how many tokens a text may have, such as context: 4096")
    rules = _rules(data.get("place"))
    stages = _stages(rules, layers, [device.name for device in devices])
    return Plan(stages, tuple(devices), **values)


def _devices(data: Any) -> tuple[Device, ...]:
    if not isinstance(data, dict) or not data:
        raise QjaxError(f'devices: expected names with sizes such as {{"cuda:0": 8GiB}}, got {_shown(data)}')
    found: dict[str, Device] = {}
    for name, value in data.items():
        where = f"devices: {_shown(name)}"
        try:
            device = _device(_text(name, "name"), value)
        except QjaxError as error:
            raise QjaxError(f"{where}: {error}") from None
        if device.name in found:
            raise QjaxError(f"{where}: {device.name} is named twice")
        found[device.name] = device
    return tuple(found.values())


def _device(name: str, value: Any) -> Device:
    values = value if isinstance(value, dict) else {"memory": value}
    _check_keys(values, _OF_DEVICE, "")
    if "memory" not in values:
        raise QjaxError("memory is missing: give its size, such as memory: 8GiB")
    memory = values["memory"]
    size = parse_size(memory) if isinstance(memory, str) else _whole(memory, "memory")
    rates = {}
    for key in _OF_DEVICE[1:]:
        if key in values:
            rate = values[key]
            is_rate = key in ("bandwidth", "link") and isinstance(rate, str)
            rates[key] = parse_rate(rate) if is_rate else _number(rate, key)
    return make_device(name, size, **rates)


def _rules(data: Any) -> list[_Rule]:
    if not isinstance(data, list) or not data:
        raise QjaxError(f"place: expected a list such as - layers 0-15: cuda:0, got {_shown(data)}")
    return [_rule(entry, f"place, entry {i + 1}") for i, entry in enumerate(data)]


def _rule(entry: Any, where: str) -> _Rule:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise QjaxError(f"{where}: expected one pair such as layers 0-15: cuda:0, got {_shown(entry)}")
    [(key, value)] = entry.items()
    where += f" ({_shown(key)})"
    try:
        text = _text(key, "what is placed").strip()
        devices, streamed = _target(value)
        if (match := _LAYERS.fullmatch(text)) is not None:
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise QjaxError(f"layers {first} to {last} are none: put the lower number first")
            return _Rule(where, range(first, last + 1), None, devices, streamed)
        if len(text) > 2 and text[0] == text[-1] == "/":
            return _Rule(where, None, _expression(text[1:-1]), devices, streamed)
        raise QjaxError("expected layers such as 'layers 0-15', or an expression such as /output/")
    except QjaxError as error:
        raise QjaxError(f"{where}: {error}") from None


def _expression(text: str) -> re.Pattern[str]:
    if len(text) > MOST_EXPRESSION:
        raise QjaxError(f"expected an expression of at most {MOST_EXPRESSION} characters, got {len(text)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise QjaxError(f"expected a regular expression: {error}") from None


def _target(value: Any) -> tuple[tuple[str, ...], bool]:
    """Devices, and whether weights are streamed to them."""
    streamed = False
    if isinstance(value, dict):
        _check_keys(value, ("device", "streamed"), "")
        streamed = value.get("streamed", False)
        if not isinstance(streamed, bool):
            raise QjaxError(f"streamed: expected true or false, got {_shown(streamed)}")
        value = value.get("device")
    names = value if isinstance(value, list) else [value]
    if not names:
        raise QjaxError("expected a device or a list of them, got none")
    devices = tuple(device_name(_text(name, "device")) for name in names)
    check_devices(devices, streamed)
    return devices, streamed


def _stages(rules: Sequence[_Rule], layers: int, known: Sequence[str]) -> tuple[StagePlan, ...]:
    for i, rule in enumerate(rules):
        for name in rule.devices:
            if name not in known:
                raise QjaxError(f"{rule.text}: device {name} is not one of {', '.join(known)}: add it to devices")
        if rule.layers is None:
            continue
        if rule.layers.stop > layers:
            raise QjaxError(f"{rule.text}: the model has layers 0 to {layers - 1} only")
        for other in rules[:i]:
            twice = other.layers is not None and range(
                max(other.layers.start, rule.layers.start), min(other.layers.stop, rule.layers.stop)
            )
            if twice:
                raise QjaxError(f"{rule.text}: layer {twice[0]} is placed by {other.text} too: each belongs to one")
    units = [EMBEDDING, *(f"blk.{i}" for i in range(layers)), OUTPUT]
    chosen = [next((k for k, rule in enumerate(rules) if rule.fits(unit)), None) for unit in units]
    for k, rule in enumerate(rules):
        if k not in chosen:
            raise QjaxError(f"{rule.text}: {_why_unused(rule, units)}")
    missing = [i for i, k in enumerate(chosen[1:-1]) if k is None]
    if missing:
        raise QjaxError(f"place: nothing says where layer {missing[0]} lies ({len(missing)} such): add an entry for it")
    at: list[int] = [chosen[1] if chosen[0] is None else chosen[0], *chosen[1:-1]]  # pyright: ignore[reportAssignmentType]
    at.append(at[-1] if chosen[-1] is None else chosen[-1])
    stages, start = [], 0
    for k, group in itertools.groupby(at):
        stop = start + len(list(group))
        held = range(max(start, 1) - 1, min(stop, layers + 1) - 1)
        stages.append(StagePlan(held, rules[k].devices, rules[k].streamed))
        start = stop
    return tuple(stages)


def _why_unused(rule: _Rule, units: Sequence[str]) -> str:
    if any(map(rule.fits, units)):
        return "entries before it decide over all that it fits: put it first"
    if rule.expression is not None and any(map(rule.expression.search, _INSIDE)):
        return f"a layer's tensors lie together: name units, {EMBEDDING}, blk.0 to blk.{len(units) - 3} or {OUTPUT}"
    return f"fits no unit; there are {EMBEDDING}, blk.0 to blk.{len(units) - 3} and {OUTPUT}"


def _check_keys(data: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            raise QjaxError(f"{where}unknown key {_shown(key)}; known are {', '.join(known)}")


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise QjaxError(f"{what}: expected a whole number of a sane size, got {_shown(value)}")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise QjaxError(f"{what}: expected a number, got {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise QjaxError(f"{what}: {_shown(value)} is too large") from None


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise QjaxError(f"{what}: expected text, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A few words of whatever stood in the file: its aliases may be circles."""
    return repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)


def as_data(plan: Plan) -> dict[str, Any]:
    """A plan for JSON."""
    stages = [
        {"layers": [stage.layers.start, stage.layers.stop], "devices": list(stage.devices), "streamed": stage.streamed}
        for stage in plan.stages
    ]
    keys = ("context", "batch", "microbatches", "cache", "activations", "type")
    return {
        "stages": stages,
        "devices": [dataclasses.asdict(device) for device in plan.devices],
        **{key: getattr(plan, key) for key in keys},
    }
