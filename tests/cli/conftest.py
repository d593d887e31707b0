"""Commands in this process and in their own, and a small model for them to work on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qjax import cli
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.writer import TensorToWrite, write_gguf

ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    code: int | str | None
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def shape() -> Shape:
    return Shape("tiny", llama(layers=1, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=128))


@pytest.fixture(scope="session")
def model(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up model of float16 matrices."""
    path = tmp_path_factory.mktemp("cli") / "model.gguf"
    save_synthetic(path, shape, "f16")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("inspect", path, ...) -> (code, out, err)`: a command in this process."""
    monkeypatch.setenv("QJAX_CACHE", "off")

    def call(*argv: Any) -> Result:
        capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., dict[str, Any]]:
    """A command with --json: its object, after a look that nothing else is on stdout."""

    def call(*argv: Any) -> dict[str, Any]:
        result = run(*argv, "--json")
        assert result.code == 0, result.err
        assert result.out.endswith("}\n")
        found = json.loads(result.out)
        assert isinstance(found, dict)
        return found

    return call


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`process("inspect", path, ..., env={...})`: a command in a process of its own."""

    def call(*argv: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"QJAX_CACHE": "off", "PYTHONPATH": str(ROOT)} | options.pop("env", {})
        command = [sys.executable, "-m", "qjax.cli", *map(str, argv)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120, **options
        )

    return call


@pytest.fixture(scope="session")
def rewritten() -> Callable[..., Path]:
    """`rewritten(path, source, meta, tensors)`: a copy of a model, changed.

    Metadata get new values (None takes a key out), tensors new names ("" takes one out).
    """

    def write(
        path: Path, source: Path, meta: Mapping[str, Any] | None = None, tensors: Mapping[str, str] | None = None
    ) -> Path:
        file = open_gguf(source)
        names = {name: (tensors or {}).get(name, name) for name in file.tensors}
        metadata = {key: value for key, value in (dict(file.metadata) | dict(meta or {})).items() if value is not None}
        kept = [(names[n], info.shape, info.type, np.array(file.raw(n))) for n, info in file.tensors.items()]
        types = {key: kind for key, kind in file.metadata_types.items() if key not in (meta or {})}
        write_gguf(path, metadata, [TensorToWrite(*entry) for entry in kept if entry[0]], metadata_types=types)
        return path

    return write
