"""The C++ core without JAX: cases of native_cases.py through check.cc, and what it refuses."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qjax.kernels.native import library

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "qjax/kernels/native/src"

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels were not built")


def core() -> ctypes.CDLL:
    kernels = library.library()
    assert kernels is not None
    return kernels


def test_every_case_on_every_instruction_set(tmp_path: Path) -> None:
    """check.cc against the installed library: all widths, groups, kinds of scales, tables; threads change no bit."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler for the check program, and Linux to link it to a library by its path")
    cases, program = tmp_path / "cases", tmp_path / "check"
    subprocess.run([sys.executable, ROOT / "tests/kernels/native_cases.py", cases], check=True)
    check = ROOT / "tests/kernels/check.cc"
    options = ["-std=c++17", "-O1", "-pthread", f"-I{SOURCES}"]
    linked = [str(library.LIBRARY), f"-Wl,-rpath,{library.LIBRARY.parent}"]
    subprocess.run([*compiler.split(), *options, str(check), *linked, "-o", str(program)], check=True)
    done = subprocess.run([program, cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    tried = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert tried == {name for number, name in enumerate(library.ISAS) if core().qjax_has_isa(number)}


def test_names_of_instruction_sets() -> None:
    assert tuple(core().qjax_isa_name(number).decode() for number in range(len(library.ISAS))) == library.ISAS
    assert core().qjax_isa_name(len(library.ISAS)) is None
    assert core().qjax_has_isa(core().qjax_best_isa())


def q4(rows: int = 5, columns: int = 64, **facts: object) -> tuple[library.Weight, list[np.ndarray]]:
    """A weight of 4 bits in groups of 32, and the arrays that it points to."""
    weight = library.Weight(rows=rows, columns=columns, group_size=32, plane_count=1, offset=8)
    weight.width[0] = 4
    held = [np.zeros(1 << 16, np.uint8) for _ in range(2)]
    weight.plane[0], weight.scale = (array.ctypes.data for array in held)
    for name, value in facts.items():
        setattr(weight, name, value)
    return weight, held


def test_sizes_of_leaves() -> None:
    weight, _ = q4(rows=33, columns=70)
    assert core().qjax_plane_bytes(weight, 0) == 3 * 3 * 4 * 64
    assert core().qjax_scale_bytes(weight) == 3 * 3 * 16 * 2
    halves, _ = q4(rows=1, columns=48, group_size=16, scale_kind=1)
    assert core().qjax_scale_bytes(halves) == 4 * 16 * 4
    blocks, _ = q4(rows=17, columns=512, scale_kind=5)
    assert core().qjax_scale_bytes(blocks) == 2 * 2 * 16 * 2
    assert core().qjax_sub_bytes(blocks) == 2 * 2 * 12 * 16


@pytest.mark.parametrize(
    "facts",
    [
        *({"rows": 0}, {"rows": 1 << 40}, {"columns": -1}, {"columns": 1 << 60}, {"group_size": 0}),
        *({"group_size": 24}, {"group_size": -32}, {"plane_count": 0}, {"plane_count": 3}, {"offset": -1}),
        *({"offset": 256}, {"scale_kind": 10}, {"scale_kind": -1}, {"scale_kind": 5}, {"scale": None}),
    ],
    ids=str,
)
def test_refuses(facts: dict[str, object]) -> None:
    """A weight that makes no sense is refused with words before anything of it is read."""
    weight, _ = q4(**facts)
    assert core().qjax_check(weight)
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32)
    results = (ctypes.c_void_p * 1)(y.ctypes.data)
    none = library.Parallel()
    given = library.Input(x=x.ctypes.data, m=1)
    assert core().qjax_matmul(weight, 1, given, results, core().qjax_best_isa(), none, None) == 1


def test_refuses_instructions_that_this_cpu_has_not() -> None:
    weight, _ = q4()
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 5), np.float32)
    results = (ctypes.c_void_p * 1)(y.ctypes.data)
    for isa in (-1, len(library.ISAS), *(n for n in range(len(library.ISAS)) if not core().qjax_has_isa(n))):
        given = library.Input(x=x.ctypes.data, m=1)
        assert core().qjax_matmul(weight, 1, given, results, isa, library.Parallel(), None) == 1


@pytest.mark.parametrize(
    "facts",
    [{"group_size": 16}, {"minimum": 1}, {"columns": 1 << 17, "group_size": 1 << 17}],
    ids=str,
)
def test_refuses_to_sum_what_integers_cannot_hold(facts: dict[str, object]) -> None:
    weight, held = q4(**{name: value for name, value in facts.items() if name != "minimum"})
    if "minimum" in facts:
        weight.minimum = held[1].ctypes.data
    assert core().qjax_check(weight) is None
    x, y = np.zeros((1, weight.columns), np.float32), np.zeros((1, 5), np.float32)
    results = (ctypes.c_void_p * 1)(y.ctypes.data)
    given = library.Input(x=x.ctypes.data, m=1, rounding=2)
    assert core().qjax_matmul(weight, 1, given, results, core().qjax_best_isa(), library.Parallel(), None) == 1
