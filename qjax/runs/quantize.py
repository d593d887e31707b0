"""A float model to a quantized file, as llama-quantize makes it: mixes, importance, wishes by name."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qjax.errors import QjaxWarning, UnsupportedError
from qjax.formats.gguf.plan import Wish
from qjax.formats.locate import locate
from qjax.formats.source import Source, open_source
from qjax.models.rewrite import Output, Planned, check_encoders, convert_to_mix, plan_mix
from qjax.quantizers.ggml import Effort
from qjax.runs.console import emit, megabytes, say_resumed, show_table


def plan_file(source: str | Path, wish: Wish, *, requantize: bool = False) -> tuple[Source, list[Planned]]:
    """The source and what would be made of it; reads no weight.

    Raises:
      QjaxError: see `plan_mix`.
    """
    opened = open_source(locate(source))
    return opened, plan_mix(opened, wish, requantize=requantize)


def dry_run(source: str | Path, wish: Wish, *, requantize: bool = False) -> dict[str, Any]:
    """The `facts` of what `quantize_file` would make; reads no weight. Warns of types that there is no encoder for.

    Raises:
      QjaxError: see `plan_file`.
    """
    opened, tensors = plan_file(source, wish, requantize=requantize)
    try:
        check_encoders(opened, tensors)
    except UnsupportedError as error:
        warnings.warn(str(error), QjaxWarning, stacklevel=2)
    return facts(tensors)


def quantize_file(
    source: str | Path,
    target: str | Path,
    wish: Wish,
    *,
    imatrix: str | Path | None = None,
    requantize: bool = False,
    effort: Effort = "normal",
    split_max_bytes: int | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Write the quantized file, whole or not at all. Returns `facts`, the files and how many tensors were done already.

    Args:
      effort: see `encode`. split_max_bytes, fresh: see `Output`.

    Raises:
      QjaxError: see `convert_to_mix`.
    """
    opened = open_source(locate(source))
    found = 0

    def resumed(done: int, total: int) -> None:
        nonlocal found
        found = done
        say_resumed(done, total)

    output = Output(split_max_bytes, fresh, resumed)
    files, tensors = convert_to_mix(
        opened, target, wish, imatrix=imatrix, requantize=requantize, effort=effort, output=output, progress=progress
    )
    return {"path": str(files[0]), "files": [str(file) for file in files], "resumed": found, **facts(tensors)}


def facts(tensors: list[Planned]) -> dict[str, Any]:
    """Sizes and types of a plan, for `--json`."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "parameters": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights if weights else 0.0,
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "from": t.source, "to": t.target, "bytes": t.nbytes}
            for t in tensors
        ],
    }


def show(result: dict[str, Any]) -> None:
    """The plan as a table."""
    rows = [
        (t["name"], " x ".join(map(str, t["shape"])), t["from"], t["to"], f"{t['bytes']:,}") for t in result["tensors"]
    ]
    show_table("", ["tensor", "shape", "from", "to", "bytes"], rows)
    emit(f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight\n")
