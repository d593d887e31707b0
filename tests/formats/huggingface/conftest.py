"""Small folders that transformers saved, to be spoilt."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Test files are no package: what several of them use is found beside them.
sys.path.insert(0, str(Path(__file__).parent))
import packers

STORED = Path(__file__).parents[2] / "interop" / "goldens" / "hf"


@pytest.fixture
def change() -> Callable[..., None]:
    """`change(path, **values)`: change keys of a JSON file; None takes one out."""

    def changed(path: Path, **changes: Any) -> None:
        values = json.loads(path.read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return changed


@pytest.fixture
def copied(tmp_path: Path, change: Callable[..., None]) -> Callable[..., Path]:
    """`copied(name, **values)`: a copy of a stored folder, with its config.json changed."""

    def copy(name: str = "llama-3", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(STORED / name, folder)
        change(folder / "config.json", **changes)
        return folder

    return copy


@pytest.fixture
def made(copied: Callable[..., Path]) -> Callable[..., Path]:
    """`made(tensors, **config)`: a folder of `packers.SIZES` whose layer has `tensors`, the rest being floats."""

    def make(tensors: packers.Tensors, **config: Any) -> Path:
        folder = copied("llama-3", **packers.SIZES, **config)
        packers.write_model(folder, tensors)
        return folder

    return make
