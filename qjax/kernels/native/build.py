"""Compile the C++ kernels for this very CPU, once, and keep the library in the user's cache.

Nothing is built when qjax is installed: the compiler of the machine that runs knows its vector units best, and a
machine without one still has the portable kernels.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jaxlib.version

from qjax.cache import cache_root
from qjax.errors import QjaxWarning

SOURCE = Path(__file__).with_name("qmatmul.cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno")
COMPILERS = ("c++", "g++", "clang++")
TARGET = "qjax_qmatmul"


@functools.cache
def _folder_of_this_process() -> Path:
    """For a user without a cache: a private folder that goes away with the process."""
    folder = tempfile.mkdtemp(prefix="qjax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def library_folder() -> Path:
    """Where compiled libraries are kept: a folder that is there and can be written, or read."""
    root = cache_root()
    if root is None:
        return _folder_of_this_process()
    folder = root / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _folder_of_this_process()
    return folder if os.access(folder, os.W_OK) or any(folder.glob("*.so")) else _folder_of_this_process()


def _compiler() -> list[str] | None:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    return None if found is None else [found]


def _cpu() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        return next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    return platform.processor()


def library_path(compiler: list[str]) -> Path:
    """Path of the library for this source, compiler, jaxlib and CPU."""
    sources = [path.read_text() for path in sorted(SOURCE.parent.glob("*.h"))]
    parts = (SOURCE.read_text(), *sources, *FLAGS, *compiler, jaxlib.version.__version__, platform.machine(), _cpu())
    return library_folder() / f"qmatmul-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def build() -> Path:
    """Compile, unless that has been done.

    Raises:
      OSError, subprocess.SubprocessError: no compiler, or it fails; the message holds its first error line.
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (c++, g++ or clang++; CXX names another)")
    path = library_path(compiler)
    if path.exists():
        return path
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    command = [*compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", temporary]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=300)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
            raise subprocess.SubprocessError(f"{compiler[0]} failed: {lines[0].strip()}")
        Path(temporary).chmod(0o755)  # a cache may be shared by users
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


@functools.cache
def available() -> bool:
    """Whether the native kernels are there: compiles and registers them on the first call.

    QJAX_NATIVE=0 turns them off. Where they cannot be had, a warning says so, once.
    """
    if os.environ.get("QJAX_NATIVE", "1") == "0":
        return False
    try:
        library = ctypes.CDLL(str(build()))
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(getattr(library, TARGET)), platform="cpu")
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: CXX is no command
        reason = " ".join(str(error).split())
        message = f"no native CPU kernels, decoding on CPU is slower: {reason} (QJAX_NATIVE=0 is silent)"
        warnings.warn(message, QjaxWarning, stacklevel=2)
        return False
    return True
