"""The library of kernels: built by setup.py if it can be, loaded on first use; its absence is said aloud."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import QjaxError, QjaxWarning
from qjax.kernels.native import library

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(not library.available(), reason="the native kernels were not built")


def without(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one warning where the library is at `path`."""
    monkeypatch.setattr(library, "LIBRARY", path)
    monkeypatch.setenv("QJAX_NATIVE", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert library.library.__wrapped__() is None
    (warning,) = caught
    assert warning.category is QjaxWarning
    message = str(warning.message)
    assert message.startswith("no native CPU kernels")
    assert "install a C++ compiler" in message
    assert "pip install --force-reinstall --no-deps --no-cache-dir --no-binary qjax qjax" in message
    return message


def test_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "not built when qjax was installed" in without(tmp_path / "_kernels.so", monkeypatch)


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_kernels.so").write_text("nonsense")
    assert str(tmp_path / "_kernels.so") in without(tmp_path / "_kernels.so", monkeypatch)


def test_built_without_jaxlib(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(np._core._multiarray_umath.__file__)
    assert "without jaxlib's headers" in without(other, monkeypatch)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_NATIVE", "0")
    assert library.library.__wrapped__() is None


@needs_library
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QJAX_ISA", raising=False)
    assert library.isa() in library.ISAS
    monkeypatch.setenv("QJAX_ISA", "generic")
    assert (library.isa(), library.isa_number()) == ("generic", 0)
    monkeypatch.setenv("QJAX_ISA", "sse9")
    with pytest.raises(QjaxError, match=r"QJAX_ISA=sse9: no such instruction set, expected one of generic"):
        library.isa()
    # No CPU has both.
    kernels = library.library()
    assert kernels is not None
    missing = next(name for number, name in enumerate(library.ISAS) if not kernels.qjax_has_isa(number))
    monkeypatch.setenv("QJAX_ISA", missing)
    with pytest.raises(QjaxError, match=f"QJAX_ISA={missing}: this CPU has no such instructions"):
        library.isa()


def build(folder: Path, compiler: str) -> tuple[str, Path]:
    """What `setup.py build_ext` says with this compiler, and where the library is if there is one."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}/lib", f"--build-temp={folder}/temp"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CXX": compiler}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, folder / "lib/qjax/kernels/native/_kernels.so"


def test_no_compiler_fails_no_install(tmp_path: Path) -> None:
    said, path = build(tmp_path, "/nonexistent")
    assert "warning: qjax: no native CPU kernels: " in said
    assert not path.exists()


def test_a_failing_compiler_fails_no_install(tmp_path: Path) -> None:
    said, path = build(tmp_path, f"{sys.executable} -c 'raise SystemExit(\"error: broken\")'")
    assert "error: broken" in said
    assert not path.exists()


def test_a_failing_handler_leaves_the_rest(tmp_path: Path) -> None:
    """The compiler here only notes what it is to compile."""
    (tmp_path / "compiler.py").write_text(
        "import sys\n"
        "if any(word.endswith('handler.cc') for word in sys.argv): sys.exit('no headers')\n"
        "open(sys.argv[sys.argv.index('-o') + 1], 'w').write(' '.join(sys.argv[1:]))\n"
    )
    said, path = build(tmp_path, f"{sys.executable} {tmp_path}/compiler.py")
    assert "warning: qjax: the kernels' door to XLA is left out" in said
    objects = {Path(word).stem for word in path.read_text().split() if word.endswith(".o")}
    sources = {path.stem for path in (ROOT / "qjax/kernels/native/src").glob("*.cc")}
    assert objects == sources - {"handler"}
