"""Bytes of codes from rows to lanes, outside of JAX: done once for each weight, while it is loaded."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from qjax.kernels.native.library import library
from qjax.kernels.native.memory import empty

# Bytes below which threads are not worth their start.
_ALONE = 1 << 20


def repack(
    data: UInt8[np.ndarray, "out nbytes"], width: int, stride: int, columns: int, flip: int
) -> UInt8[np.ndarray, "tiles lane_bytes"]:
    """One plane's bytes, chunks of `stride`, in lanes: `arrays.lanes.repack` by the C++ kernels, on all cores.

    Raises:
      ValueError: no kernels, or planes of a width that they do not know.
    """
    kernels = library()
    if kernels is None:
        raise ValueError("no native CPU kernels")
    data = np.ascontiguousarray(data)
    tiles, steps = -(-data.shape[0] // 16), -(-columns // 32)
    lanes = empty((tiles, steps * 64 * width), np.uint8)

    def part(first: int, last: int) -> int:
        # The lock on Python's objects is free while this runs.
        return kernels.qjax_to_lanes(
            data.ctypes.data, data.shape[0], columns, width, stride, flip, first, last - first, lanes.ctypes.data
        )

    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, tiles)
    if threads == 1 or data.nbytes < _ALONE:
        codes = [part(0, tiles)]
    else:
        borders = [tiles * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            codes = list(pool.map(part, borders[:-1], borders[1:]))
    if any(codes):
        raise ValueError(f"no lanes for planes of {width} bits in chunks of {stride} bytes")
    return lanes
