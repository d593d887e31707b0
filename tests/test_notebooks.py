"""Every notebook runs from its first cell to its last, and is stored as a run left it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
# Notebooks that take minutes: run by `make slow`.
SLOW = frozenset({"packed_weights.ipynb"})
LONGEST_SECONDS = 240
LARGEST_BYTES = 100_000

# One namespace for all cells, as in a kernel; an error names its cell. Figures go nowhere.
RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
for i, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"<cell {i}>", "exec"), namespace)
"""


def cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


def test_slow_ones_are_there() -> None:
    assert NAMES
    assert set(NAMES) >= SLOW


@pytest.mark.parametrize("name", [marked(name) for name in NAMES])
def test_runs(name: str, tmp_path: Path) -> None:
    """In a process of its own, under JAX's usual rules, as a reader runs it; what it writes lands elsewhere."""
    strict = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")
    environment = {key: value for key, value in os.environ.items() if key not in strict} | {"MPLBACKEND": "Agg"}
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER, str(FOLDER / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Warning" not in ended.stderr.replace("QjaxWarning: no native CPU kernels", "")


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_as_one_run_left_it(name: str) -> None:
    """Numbered in order, no error among its outputs, and small."""
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert (FOLDER / name).stat().st_size < LARGEST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_explains_itself(name: str) -> None:
    """It begins with a title, and text stands before the code."""
    first, *rest = cells(name)
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    assert sum(cell["cell_type"] == "markdown" for cell in rest) >= len(rest) / 3
    assert len({cell["id"] for cell in cells(name)}) == len(rest) + 1
