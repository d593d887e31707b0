"""A plan: which stage of the model lies where. Data only; `qjax.pipeline.report` says what it costs."""

import dataclasses

from qjax.errors import QjaxError
from qjax.kernels import Activations
from qjax.models import CacheKind
from qjax.pipeline.devices import Device

# Of a batch or a context: they are multiplied with sizes.
MOST_COUNT = 1 << 32


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Consecutive units compiled as one program on a device, or on a mesh of several with tensor parallelism.

    The model is a row of units: token_embd, the layers, output (output_norm with the output matrix). The first stage
    holds token_embd too and the last stage output, so that either of these may have no layers.

    Attributes:
      layers: which ones, a range of step 1.
      devices: names; several are one mesh, and of one kind.
      streamed: weights stay packed in the host's memory and are brought to the device unit by unit, each time.
    """

    layers: range
    devices: tuple[str, ...]
    streamed: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a model lies, and what for.

    A device may have several stages; the memory of all of them is counted.

    Attributes:
      stages: in the order in which a token passes them; together they hold every layer once.
      devices: all that may be used, in the order given; one may have no stage.
      context, batch: tokens of each text, prompt included, and texts at a time.
      microbatches: parts of the batch that are under way at a time, in different stages.
      cache: what keys and values are kept as.
      activations: how x is rounded before each product; None for each device's default.
      type: what float matrices are quantized to while they are loaded ("q4_k_m"); None to load them as they are.

    Raises:
      QjaxError: gaps, overlaps, devices that are not there, or numbers out of range.
    """

    stages: tuple[StagePlan, ...]
    devices: tuple[Device, ...]
    context: int
    batch: int = 1
    microbatches: int = 1
    cache: CacheKind = "float"
    activations: Activations | None = None
    type: str | None = None

    def __post_init__(self) -> None:
        for what in ("context", "batch", "microbatches"):
            if not 1 <= getattr(self, what) < MOST_COUNT:
                raise QjaxError(f"expected a {what} of 1 to {MOST_COUNT - 1}, got {getattr(self, what)}")
        if self.microbatches > self.batch:
            raise QjaxError(f"a batch of {self.batch} cannot be cut into {self.microbatches} microbatches: use fewer")
        names = [device.name for device in self.devices]
        if len(set(names)) != len(names):
            raise QjaxError(f"a device is named twice: {', '.join(names)}")
        if not self.stages:
            raise QjaxError("a plan needs at least one stage")
        expected = 0
        for i, stage in enumerate(self.stages):
            _check_stage(i, stage, names, inner=0 < i < len(self.stages) - 1)
            if stage.layers.start != expected:
                found = "are missing" if stage.layers.start > expected else "are placed twice"
                first, last = sorted((expected, stage.layers.start))
                raise QjaxError(f"stage {i}: layers {first} to {last - 1} {found}: each layer belongs to one stage")
            expected = stage.layers.stop

    @property
    def layers(self) -> int:
        """Of the model."""
        return self.stages[-1].layers.stop

    @property
    def rows(self) -> int:
        """Texts in the largest microbatch."""
        return -(-self.batch // self.microbatches)

    def device(self, name: str) -> Device:
        """The device of this name."""
        return next(device for device in self.devices if device.name == name)


def _check_stage(i: int, stage: StagePlan, known: list[str], *, inner: bool) -> None:
    if stage.layers.step != 1 or stage.layers.start > stage.layers.stop or (inner and not stage.layers):
        raise QjaxError(f"stage {i}: expected a range of layers, got {stage.layers}")
    try:
        check_devices(stage.devices, stage.streamed)
    except QjaxError as error:
        raise QjaxError(f"stage {i}: {error}") from None
    for name in stage.devices:
        if name not in known:
            raise QjaxError(f"stage {i}: device {name} is not one of {', '.join(known) or 'none'}")


def check_devices(devices: tuple[str, ...], streamed: bool) -> None:
    """QjaxError unless these can be a stage's devices."""
    if not devices or len(set(devices)) != len(devices):
        raise QjaxError(f"expected devices, each once, got {', '.join(devices) or 'none'}")
    kinds = {name.partition(":")[0] for name in devices}
    if len(kinds) > 1:
        raise QjaxError(f"{', '.join(devices)} are of several kinds, which cannot be one mesh")
    if streamed and (len(devices) > 1 or kinds == {"cpu"}):
        raise QjaxError(f"weights are streamed to one accelerator, not to {', '.join(devices)}")
