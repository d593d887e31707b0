"""The devices of this process: their free memory, and how fast they are, measured once and kept on the disk."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.cache import cache_root
from qjax.errors import QjaxError
from qjax.formats.atomic import atomic_file
from qjax.pipeline.devices import KINDS, Device

# Where neither JAX nor the system says how much memory there is.
_UNKNOWN_MEMORY = 4 << 30
_READ_BYTES, _SENT_BYTES, _SIDE = 128 << 20, 32 << 20, 1024
_REPEATS = 5
_RATES = ("bandwidth", "flops", "link", "latency")


def available_memory() -> int | None:
    """Bytes that can still be allocated without swapping, by Linux's reckoning; None where that is not to be had."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def named_devices() -> dict[str, Any]:
    """JAX's devices of this process by the names that plans have for them, accelerators first."""
    found = list(jax.local_devices())
    if jax.default_backend() != "cpu":
        found += jax.local_devices(backend="cpu")
    counts: Counter[str] = Counter()
    named = {}
    for device in found:
        kind = kind_of(device)
        named[f"{kind}:{counts[kind]}"] = device
        counts[kind] += 1
    return named


def local_devices() -> tuple[Device, ...]:
    """The accelerators of this process, then its CPU devices, which share the memory that is free."""
    found = named_devices()
    cpus = sum(device.platform == "cpu" for device in found.values())
    known = _read_cache()
    made, before = [], dict(known)
    for name, device in found.items():
        kind = kind_of(device)
        key = f"{kind}, {device.device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
        rates = known.get(key)
        if rates is None:
            rates = known[key] = measured(device)
        memory = (available_memory() or _UNKNOWN_MEMORY) // cpus if kind == "cpu" else _free_memory(device)
        made.append(Device(name, memory, **rates))
    if known != before:
        _write_cache(known)
    return tuple(made)


def kind_of(device: Any) -> str:
    """What a plan calls the platform: "cuda" or "rocm" for JAX's "gpu"."""
    if device.platform != "gpu":
        return device.platform if device.platform in KINDS else "gpu"
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _free_memory(device: Any) -> int:
    stats: dict[str, Any] = device.memory_stats() or {}
    limit = stats.get("bytes_limit", _UNKNOWN_MEMORY)
    return max(limit - stats.get("bytes_in_use", 0), 1)


def measured(device: Any) -> dict[str, float]:
    """bandwidth, flops, link and latency of a device: a second or two."""
    read = jax.device_put(np.ones(_READ_BYTES // 4, np.float32), device)
    square = jax.device_put(np.ones((_SIDE, _SIDE), np.float32), device)
    sent, little = np.ones(_SENT_BYTES, np.uint8), np.ones(1, np.float32)
    total, product = jax.jit(jnp.sum), jax.jit(lambda x: x @ x)
    return {
        "bandwidth": _READ_BYTES / _least_seconds(lambda: total(read)),
        "flops": 2 * _SIDE**3 / _least_seconds(lambda: product(square)),
        # A copy: a CPU device would take the host's array as it is.
        "link": _SENT_BYTES / _least_seconds(lambda: jnp.array(jax.device_put(sent, device), copy=True)),
        "latency": _least_seconds(lambda: jax.device_put(little, device)),
    }


def _least_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _cache_file() -> Path | None:
    root = cache_root()
    return None if root is None else root / "devices.json"


def _read_cache() -> dict[str, dict[str, float]]:
    """What was measured before, without what is not sound."""
    path = _cache_file()
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    sound: dict[str, dict[str, float]] = {}
    for key, rates in data.items() if isinstance(data, dict) else ():
        try:
            sound[key] = {name: float(rates[name]) for name in _RATES}
            Device("cpu:0", 1, **sound[key])
        except (KeyError, TypeError, ValueError, QjaxError):
            sound.pop(key, None)
    return sound


def _write_cache(known: dict[str, dict[str, float]]) -> None:
    path = _cache_file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(known, indent=1).encode())
    except (OSError, QjaxError):
        # Measured again the next time.
        return
