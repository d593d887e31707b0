"""The library of CPU kernels that was built with the package (setup.py): found, loaded and registered on first use."""

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import jax

from qjax.errors import QjaxError, QjaxWarning

LIBRARY = Path(__file__).with_name("_kernels.so")
MATMUL_TARGET, DENSE_TARGET, ATTENTION_TARGET = "qjax_matmul_ffi", "qjax_matmul_dense_ffi", "qjax_attention_ffi"
RMS_NORM_TARGET, SWIGLU_TARGET, ROPE_TARGET = "qjax_rms_norm_ffi", "qjax_swiglu_ffi", "qjax_rope_ffi"
TARGETS = (MATMUL_TARGET, DENSE_TARGET, ATTENTION_TARGET, RMS_NORM_TARGET, SWIGLU_TARGET, ROPE_TARGET)

# core.h's qjax_isa.
ISAS = ("generic", "avx2", "avx_vnni", "avx512_vnni", "neon_dot", "neon_i8mm")

# pip keeps the wheels that it builds: without --no-cache-dir it would install the one without kernels again.
AGAIN = (
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary qjax qjax` (in a source tree: `pip install -e ."
)


class Weight(ctypes.Structure):
    """core.h's qjax_weight."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group_size")),
        ("plane_count", ctypes.c_int32),
        ("width", ctypes.c_int32 * 2),
        *((name, ctypes.c_int32) for name in ("offset", "scale_kind", "has_table")),
        ("table", ctypes.c_int8 * 16),
        ("plane", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("scale", "minimum", "sub", "zero")),
        ("value_kind", ctypes.c_int32),
        ("values", ctypes.c_float * 16),
        *((name, ctypes.c_void_p) for name in ("scale_table", "super_scale", "start")),
        *((name, ctypes.c_int64) for name in ("supers", "scale_block")),
        ("scale_offset", ctypes.c_float),
    )


class Input(ctypes.Structure):
    """core.h's qjax_input."""

    _fields_ = (
        *(("x", ctypes.c_void_p), ("m", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("columns", "input_scale", "x_scale")),
        ("rounding", ctypes.c_int32),
    )


class AttentionArguments(ctypes.Structure):
    """core.h's qjax_attention_args."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scale", "v_scale", "positions", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "seq", "heads", "kv_heads", "slots", "dim", "window")),
        ("kind", ctypes.c_int32),
    )


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
Parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, Task, ctypes.c_void_p)


def declare(kernels: ctypes.CDLL) -> None:
    """Tell ctypes the types of core.h's functions."""
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    weight = ctypes.POINTER(Weight)
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "qjax_plane_bytes": (n, (weight, i)),
        "qjax_scale_bytes": (n, (weight,)),
        "qjax_sub_bytes": (n, (weight,)),
        "qjax_zero_bytes": (n, (weight,)),
        "qjax_check": (ctypes.c_char_p, (weight,)),
        "qjax_has_isa": (i, (i,)),
        "qjax_best_isa": (i, ()),
        "qjax_isa_name": (ctypes.c_char_p, (i,)),
        "qjax_matmul": (i, (weight, n, ctypes.POINTER(Input), ctypes.POINTER(p), i, Parallel, p)),
        "qjax_matmul_dense": (i, (p, n, n, i, p, n, p, i, Parallel, p)),
        "qjax_attention": (i, (ctypes.POINTER(AttentionArguments), i, Parallel, p)),
        "qjax_to_lanes": (i, (p, n, n, i, i, i, n, n, p)),
    }
    for name, (result, arguments) in signatures.items():
        function: Callable[..., object] = getattr(kernels, name)
        function.restype, function.argtypes = result, arguments  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _register(path: Path) -> ctypes.CDLL:
    """Load the library and give XLA its handlers.

    Raises:
      OSError, AttributeError: it is not there, or not whole; RuntimeError: this jaxlib refuses its handlers.
    """
    if not path.exists():
        raise FileNotFoundError("they were not built when qjax was installed")
    kernels = ctypes.CDLL(str(path))
    if not hasattr(kernels, MATMUL_TARGET):
        raise FileNotFoundError("they were built without jaxlib's headers")
    declare(kernels)
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(kernels, target)), platform="cpu")
    return kernels


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of src/core.h, or None where they cannot be had; a warning says why, once.

    QJAX_NATIVE=0 turns them off.
    """
    if os.environ.get("QJAX_NATIVE", "1") == "0":
        return None
    try:
        return _register(LIBRARY)
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
    message = (
        f"no native CPU kernels, everything on CPU is slower: {reason}; install a C++ compiler (g++ or clang++), then "
        f"`{AGAIN}`); QJAX_NATIVE=0 is silent"
    )
    warnings.warn(message, QjaxWarning, stacklevel=2)
    return None


def available() -> bool:
    """Whether the native kernels are there; loads and registers them on the first call."""
    return library() is not None


def isa_number() -> int:
    """core.h's number of the instruction set that the kernels use: QJAX_ISA, or the best that this CPU has.

    Raises:
      QjaxError: no kernels; or QJAX_ISA names no instruction set, or one that this CPU does not have.
    """
    kernels = library()
    if kernels is None:
        raise QjaxError("no native CPU kernels, so no instruction set to choose")
    named = os.environ.get("QJAX_ISA")
    if named is None:
        return kernels.qjax_best_isa()
    here = [name for number, name in enumerate(ISAS) if kernels.qjax_has_isa(number)]
    if named not in here:
        known = "this CPU has no such instructions" if named in ISAS else "no such instruction set"
        raise QjaxError(f"QJAX_ISA={named}: {known}, expected one of {', '.join(here)}")
    return ISAS.index(named)


def isa() -> str | None:
    """The instruction set that the kernels use, e.g. "avx512_vnni"; None without them."""
    return None if library() is None else ISAS[isa_number()]
