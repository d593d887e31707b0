"""What a plan knows of a device: its memory, and how fast it reads weights, multiplies and is reached."""

import dataclasses
import math
import re

from qjax.errors import QjaxError
from qjax.sizes import parse_size

_NAME = re.compile(r"(?P<kind>[a-z]{2,16})(?::(?P<index>\d{1,4}))?", re.ASCII)
# More than any machine has: what is above it is a slip, and would overflow what it is multiplied with.
MOST_MEMORY, MOST_RATE = 1 << 60, 1e18


@dataclasses.dataclass(frozen=True)
class Device:
    """A device to place layers on.

    Attributes:
      name: "cuda:0", "tpu:3", "cpu:0": a platform of JAX and the number of the device in it.
      memory: bytes that the plan may use of it.
      bandwidth: bytes/s that weights are read with while they are multiplied.
      flops: of a product of matrices, a second.
      link: bytes/s to and from the host's memory.
      latency: seconds that a hop to the device takes however little travels.

    Raises:
      QjaxError: a name that is none, or a number that is not positive, not finite or absurd.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    latency: float

    def __post_init__(self) -> None:
        device_name(self.name)
        if not 0 < self.memory <= MOST_MEMORY:
            raise QjaxError(f"device {self.name}: expected a memory of 1 byte to 1 EiB, got {self.memory:.6g} bytes")
        for what in ("bandwidth", "flops", "link"):
            value = getattr(self, what)
            if not (math.isfinite(value) and 1 <= value <= MOST_RATE):
                raise QjaxError(f"device {self.name}: expected a {what} of 1 to {MOST_RATE:g} a second, got {value:g}")
        if not 0 <= self.latency <= 3600:
            raise QjaxError(f"device {self.name}: expected a latency of 0 to 3600 seconds, got {self.latency:g}")

    @property
    def kind(self) -> str:
        """The platform: "cuda", "cpu"."""
        return self.name.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a device of a platform is taken for where nothing else is said; see `Device`."""

    bandwidth: float
    flops: float
    link: float
    latency: float


# Modest ones of each kind: two cores' share of a server's DDR5; a data-centre GPU of 2020 behind PCIe 4 x16 (A100: 1.5
# TB/s, of which small kernels reach half); a TPU v5e (819 GB/s, PCIe 3). A measured or given number replaces them.
KINDS: dict[str, Kind] = {
    "cpu": Kind(bandwidth=30e9, flops=0.4e12, link=10e9, latency=20e-6),
    "cuda": Kind(bandwidth=800e9, flops=60e12, link=20e9, latency=50e-6),
    "rocm": Kind(bandwidth=800e9, flops=60e12, link=20e9, latency=50e-6),
    "gpu": Kind(bandwidth=800e9, flops=60e12, link=20e9, latency=50e-6),
    "tpu": Kind(bandwidth=600e9, flops=100e12, link=10e9, latency=100e-6),
}


def device_name(text: str) -> str:
    """A device's name with its number: "cpu" is "cpu:0".

    Raises:
      QjaxError: no platform that is known, or no number.
    """
    match = _NAME.fullmatch(text.strip().lower())
    if match is None or match["kind"] not in KINDS:
        raise QjaxError(f"expected a device such as cuda:0 or cpu:0 (of {', '.join(KINDS)}), got {text[:80]!r}")
    return f"{match['kind']}:{int(match['index'] or 0)}"


def make_device(name: str, memory: int, **given: float) -> Device:
    """A device of its kind's defaults but for what is given of bandwidth, flops, link and latency.

    Raises:
      QjaxError: see `Device`.
    """
    name = device_name(name)
    return Device(name, memory, **{**dataclasses.asdict(KINDS[name.partition(":")[0]]), **given})


def parse_rate(text: str) -> float:
    """Bytes a second of "900GB/s"; the "/s" may be missing.

    Raises:
      QjaxError: no such rate.
    """
    try:
        return float(min(parse_size(text.strip().removesuffix("/s")), 1 << 100))
    except QjaxError:
        raise QjaxError(f"expected a rate such as 900GB/s, got {text[:80]!r}") from None


def parse_devices(text: str) -> tuple[Device, ...]:
    """Devices of "cuda:0=8GiB,cpu:0=16GiB"; "cuda:0=8GiB@900GB/s" says how fast weights are read there.

    Raises:
      QjaxError: no such text, a device that is named twice, or see `Device`.
    """
    devices: dict[str, Device] = {}
    for entry in text.split(","):
        name, sign, size = entry.partition("=")
        if not sign:
            raise QjaxError(f"devices: expected NAME=SIZE such as cuda:0=8GiB, got {entry.strip()[:80]!r}")
        memory, at, rate = size.partition("@")
        try:
            given = {"bandwidth": parse_rate(rate)} if at else {}
            device = make_device(name, parse_size(memory), **given)
        except QjaxError as error:
            raise QjaxError(f"devices: in {entry.strip()[:80]!r}: {error}") from None
        if device.name in devices:
            raise QjaxError(f"devices: {device.name} is named twice: give each once")
        devices[device.name] = device
    return tuple(devices.values())
