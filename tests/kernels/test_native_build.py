"""The C++ kernels are compiled once, and their absence is said aloud."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from qjax.errors import QjaxWarning
from qjax.kernels.native import build


def test_no_compiler_is_a_warning_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("QJAX_NATIVE", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert build.available.__wrapped__() is False
    assert [w.category for w in caught] == [QjaxWarning]
    assert "decoding on CPU is slower: no C++ compiler found" in str(caught[0].message)


def test_a_failing_compiler_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"error: broken\")'")
    with pytest.raises(subprocess.SubprocessError, match="error: broken"):
        build.build()
    assert list((tmp_path / "native").iterdir()) == []


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_NATIVE", "0")
    assert build.available.__wrapped__() is False
