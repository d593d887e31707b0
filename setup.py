"""Builds the CPU kernels: one shared library of plain C functions and XLA's handlers for them, loaded by ctypes.

An install never fails for it. Without a compiler, or where one fails, qjax runs on XLA's own kernels and says so on
first use (qjax/kernels/native/library.py). Everything else about the package stands in pyproject.toml.

CXX, CXXFLAGS and LDFLAGS name a compiler and more options.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("qjax/kernels/native/src")
# The one file that needs jaxlib's headers.
HANDLER = SOURCES / "handler.cc"
COMPILERS = ("c++", "g++", "clang++")
# No -march: each isa_*.cc says itself for which instructions it is compiled. No -ffast-math: NaN and infinity count.
# No warnings: those of the compilers' own intrinsics are many, and `make sanitize` finds what matters.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-w")


def compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"no C++ compiler found ({', '.join(COMPILERS)}; CXX names another)")
    return [found]


def from_environment(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def handler_headers() -> Path:
    """Where jaxlib keeps XLA's FFI headers, found without importing it."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        raise FileNotFoundError("no jaxlib to build against")
    folder = Path(found.origin).parent / "include"
    if not (folder / "xla/ffi/api/ffi.h").exists():
        raise FileNotFoundError(f"no FFI headers in {folder}")
    return folder


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        raise subprocess.SubprocessError(f"{shlex.join(command)} failed with exit code {done.returncode}")


def build_library(sources: Sequence[Path], folder: Path, library: Path) -> None:
    """Compile `sources` into `library`, without the handler where it does not compile.

    Raises:
      OSError, subprocess.SubprocessError, ValueError: no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise OSError("the CPU kernels are written for GCC and Clang, not for Windows yet")
    command = [*compiler(), *FLAGS, *from_environment("CXXFLAGS"), *from_environment("ARCHFLAGS")]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str | None:
        to = folder / f"{source.stem}.o"
        try:
            headers = [f"-I{handler_headers()}"] if source == HANDLER else []
            run([*command, *headers, "-c", str(source), "-o", str(to)])
        except (OSError, subprocess.SubprocessError) as error:
            if source != HANDLER:
                raise
            print(f"warning: qjax: the kernels' door to XLA is left out: {error}", file=sys.stderr)
            return None
        return str(to)

    # The longest first: the files of instruction sets.
    ordered = sorted(sources, key=lambda source: not source.name.startswith("isa_"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [name for name in pool.map(compiled, ordered) if name is not None]
    library.parent.mkdir(parents=True, exist_ok=True)
    shared = "-dynamiclib" if sys.platform == "darwin" else "-shared"
    run([*command, shared, *objects, "-o", str(library), *from_environment("LDFLAGS")])


class BuildKernels(build_ext):
    """A library of its own instead of a module of Python's, so nothing of Python's flags or names is in it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            build_library([Path(source) for source in ext.sources], Path(self.build_temp) / "qjax", library)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            library.unlink(missing_ok=True)
            print(f"warning: qjax: no native CPU kernels: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # In a source tree a library of older sources must not be taken for theirs.
        for name in map(self.get_ext_filename, (ext.name for ext in self.extensions)):
            if not Path(self.build_lib, name).exists():
                Path(name).unlink(missing_ok=True)


class TagWheel(bdist_wheel):
    """The library depends on the platform, and on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    "qjax.kernels.native._kernels",
    sources=sorted(str(path) for path in SOURCES.glob("*.cc")),
    depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in SOURCES.glob(pattern)),
    language="c++",
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel})
