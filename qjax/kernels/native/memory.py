"""Memory for weights that kernels stream from end to end, in large pages where the system has them."""

import contextlib
import ctypes
import mmap
import threading
from typing import Any

import numpy as np

# Bytes asked of the system at a time: neighbours share its pages. A chunk is freed with the last array in it.
CHUNK = 64 << 20
# JAX takes an array over without a copy if it starts at such an address.
_ALIGNED = 64

_lock = threading.Lock()
_chunk: np.ndarray = np.empty(0, np.uint8)


def _large_pages(nbytes: int) -> np.ndarray:
    """Zeroed memory of its own, on Linux in pages of 2 MiB: small ones cost a stream of weights its speed."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, nbytes, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without large pages says EINVAL: the memory is as good, only slower.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def return_when_freed() -> None:
    """From now on, memory of a MiB or more goes back to the system as soon as it is freed.

    glibc keeps it otherwise, for each thread its own, and in pieces that the next array does not fit in. For a process
    that makes a file: one that runs a model gains by what is kept.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of any contents, like `numpy.empty`, that `jax.device_put` takes over as it is on CPU.

    Raises:
      OSError: no memory.
    """
    global _chunk
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    taken = -(-nbytes // _ALIGNED) * _ALIGNED
    with _lock:
        if taken > _chunk.size:
            if taken > CHUNK // 2:
                # What is left of the chunk serves the small arrays that follow.
                return _large_pages(taken)[:nbytes].view(dtype).reshape(shape)
            _chunk = _large_pages(CHUNK)
        here, _chunk = _chunk[:nbytes], _chunk[taken:]
    return here.view(dtype).reshape(shape)
