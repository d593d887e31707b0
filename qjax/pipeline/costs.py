"""What a stage costs on a device: bytes of its memory, seconds of a decode step.

Workspace is what XLA's `memory_analysis()` says of the layer's programs (measured on CPU, by native kernels and by
XLA's own, for chunks of prompts and single tokens), put as a formula of the sizes; MARGIN is added to it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from qjax.kernels import native
from qjax.kernels.tiles import TILE_MANY
from qjax.models import CacheKind
from qjax.models.slots import chunk_sizes, slots_for
from qjax.pipeline.devices import Device
from qjax.pipeline.plan import Plan
from qjax.pipeline.sizes import ModelSizes

# Of activations and workspace, beside them: the formulas were fitted on some shapes.
MARGIN = 0.1
FLOAT = 4
# Floats of a dequantized tile (kernels/tiles.py), with its product and the codes that it comes from.
_TILE_BYTES = 3 * FLOAT * TILE_MANY
# Logits, those of the chunk before, and what a sampler sorts and sums.
_LOGITS = 4


class Held(NamedTuple):
    """Bytes on a device: weights, keys and values, and activations with workspace, MARGIN included."""

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return sum(self)


class Seconds(NamedTuple):
    """Of one decode step of a microbatch: what a stage's device reads, multiplies and waits for, and hops to it.

    A stage takes the longest of reading (weights, keys and values), multiplying and streaming (weights from the host),
    then its sums over a mesh, then the hop.
    """

    reading: float
    multiplying: float
    streaming: float
    sums: float
    hop: float

    @property
    def total(self) -> float:
        return max(self.reading, self.multiplying, self.streaming) + self.sums + self.hop

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        parts = {"memory": self.reading, "arithmetic": self.multiplying, "link": self.streaming, "hops": self.sums}
        parts["hops"] += self.hop
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a model for a context, a batch in microbatches, and a kind of cache.

    Units are counted as in `ModelSizes`: 0 is token_embd, the last one output.
    """

    sizes: ModelSizes
    context: int
    batch: int
    microbatches: int = 1
    cache: CacheKind = "float"

    @property
    def units(self) -> int:
        return len(self.sizes.units)

    @property
    def rows(self) -> int:
        """Texts in the largest microbatch."""
        return -(-self.batch // self.microbatches)

    @functools.cached_property
    def slots(self) -> int:
        """Of the cache: the context with the padding of the longest prompt, in whole units of slots."""
        return slots_for(max(self.context - 1, 1), 1)

    @functools.cached_property
    def chunk(self) -> int:
        """Tokens of a prompt that pass at a time."""
        return max(chunk_sizes(max(self.context - 1, 1)))

    def _layers(self, start: int, stop: int) -> int:
        return max(min(stop, self.units - 1) - max(start, 1), 0)

    def _cache_layer(self, rows: int, n: int) -> int:
        config = self.sizes.config
        heads = max(config.kv_heads // n, 1)
        entry = config.head_dim + FLOAT if self.cache == "int8" else 2 * config.head_dim
        return 2 * rows * heads * self.slots * entry

    def held(self, start: int, stop: int, kind: str, n: int = 1, *, streamed: bool = False) -> Held:
        """Bytes on each of n devices of a kind that compute the units start to stop - 1; two at a time of streamed
        ones."""
        if streamed:
            weights = 2 * max((self.sizes.weights(i, i + 1, kind) for i in range(max(start, 1), stop)), default=0)
            weights += self.sizes.weights(0, 1, kind) if start == 0 else 0
        else:
            weights = self.sizes.weights(start, stop, kind, n)
        cache = self._layers(start, stop) * self._cache_layer(self.batch, n)
        return Held(weights, cache, round((1 + MARGIN) * self._work(start, stop, kind, n)))

    def _work(self, start: int, stop: int, kind: str, n: int) -> int:
        config = self.sizes.config
        tokens = self.rows * self.chunk
        hidden = FLOAT * tokens * config.hidden
        # What comes in and what goes out; of microbatches the next one's too.
        work = hidden * (2 if self.microbatches == 1 else 3)
        if self._layers(start, stop):
            heads, kv_heads = config.heads // n, max(config.kv_heads // n, 1)
            q, kv = heads * config.head_dim, kv_heads * config.head_dim
            angles = 2 * FLOAT * tokens * (config.rope_dim // 2)
            ffn = FLOAT * tokens * 3 * (config.ffn // n) + 2 * hidden
            attention = FLOAT * tokens * (3 * q + 4 * kv) + 2 * hidden
            if not (kind == "cpu" and native.available()):
                # XLA's attention holds scores and weights of all heads, and the keys and values as floats.
                attention += 2 * FLOAT * tokens * heads * self.slots
                attention += 2 * FLOAT * self.rows * kv * self.slots
                ffn, attention = ffn + _TILE_BYTES, attention + _TILE_BYTES
            work += angles + max(ffn, attention)
        if stop == self.units:
            work += _LOGITS * FLOAT * self.batch * config.vocab
        return work

    def host(self, start: int, stop: int) -> int:
        """Bytes of the host's memory that streamed units take; the embedding lies on the device."""
        return self.sizes.weights(max(start, 1), stop, "host")

    def seconds(self, start: int, stop: int, devices: tuple[Device, ...], *, streamed: bool = False) -> Seconds:
        """Of one decode step of a microbatch, all slots of its cache being read."""
        config, n, device = self.sizes.config, len(devices), _slowest(devices)
        # Of the embedding only rows are looked up.
        multiplied = self.sizes.multiplied[stop] - self.sizes.multiplied[start]
        weights = self.sizes.weights(max(start, 1), stop, device.kind, n)
        layers = self._layers(start, stop)
        read = weights + layers * self._cache_layer(self.rows, n)
        flops = 2 * self.rows * (multiplied + 2 * layers * config.heads * config.head_dim * self.slots) / n
        hidden = FLOAT * self.rows * config.hidden
        sums = 2 * layers * (device.latency + hidden / device.link) if n > 1 else 0.0
        tokens = FLOAT * self.rows
        travels = (tokens if start == 0 else hidden) + (tokens if stop == self.units else hidden)
        return Seconds(
            reading=read / device.bandwidth,
            multiplying=flops / device.flops,
            streaming=self.host(start, stop) / device.link if streamed else 0.0,
            sums=sums,
            hop=device.latency + travels / device.link,
        )


def _slowest(devices: tuple[Device, ...]) -> Device:
    """A device as slow as the slowest of a mesh in each way."""
    if len(devices) == 1:
        return devices[0]
    slow = {what: min(getattr(device, what) for device in devices) for what in ("bandwidth", "flops", "link")}
    return dataclasses.replace(devices[0], latency=max(device.latency for device in devices), **slow)


def together(held: Sequence[Held]) -> Held:
    """What several stages of one device hold: they work at different times."""
    return Held(sum(h.weights for h in held), sum(h.cache for h in held), max((h.work for h in held), default=0))


def costs_of(plan: Plan, sizes: ModelSizes) -> Costs:
    """The costs that a plan is seen with."""
    return Costs(sizes, plan.context, plan.batch, plan.microbatches, plan.cache)


def units_of(plan: Plan) -> list[tuple[int, int]]:
    """The units (first, last + 1) of each stage, as `Costs` counts them."""
    last = len(plan.stages) - 1
    return [
        (0 if k == 0 else stage.layers.start + 1, stage.layers.stop + (2 if k == last else 1))
        for k, stage in enumerate(plan.stages)
    ]
