"""The main job on the model that comes with qjax: several types side by side, a plot, a streamed completion."""

import statistics
import time
from pathlib import Path
from typing import Any

from qjax import api
from qjax.evaluate.plots import plot_types
from qjax.evaluate.speed import measure
from qjax.runs.console import console, emit, megabytes, show_table
from qjax.runs.corpus import heldout_text
from qjax.runs.texts import measure_perplexity

TYPES = ("f16", "q8_0", "q5_1", "q4_0")
PROMPT = 'class Reader:\n    """'
SAMPLING = {"max_tokens": 80, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 2}
# Text is long enough for a stable figure and short enough for a demo.
CHUNKS = 24


def demo(out: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Open the embedded model at each of TYPES; print a table, write `out`/demo.png, stream a completion.

    The figures are measured now: perplexity on files of this Python's standard library that the model was not
    trained on, tokens per second of greedy decoding.
    """
    start = time.perf_counter()
    text = heldout_text()
    models = {name: api.load("embedded", quantize=None if name == "f16" else name) for name in TYPES}
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        console.print(f"perplexity of the embedded model at {name} ...", style="dim")
        size = model.memory
        ppl = measure_perplexity(model, text, ctx=512, chunks=CHUNKS)
        rows.append(
            {
                "type": name,
                "bytes": size.nbytes,
                "bits_per_weight": size.bits_per_weight,
                "perplexity": ppl["perplexity"],
                "stderr": ppl["stderr"],
            }
        )
    for row, rate in zip(rows, _rates(models), strict=True):
        row["tokens_per_second"] = rate
    model = models[TYPES[-1]]
    path = plot_types(rows, out / "demo.png")
    if as_json:
        completion = "".join(model.generate(PROMPT, **SAMPLING))
    else:
        _show(rows)
        emit(f"\nplot: {path}\n\n{TYPES[-1]} continues:\n\n{PROMPT}")
        completion = ""
        for piece in model.generate(PROMPT, **SAMPLING):
            emit(piece)
            completion += piece
        emit("\n")
    return {
        "rows": rows,
        "plot": str(path),
        "prompt": PROMPT,
        "completion": completion,
        "seconds": time.perf_counter() - start,
    }


def _rates(models: dict[str, api.Model]) -> list[float]:
    """Median tokens per second of each model; they take turns, so that a busy machine is busy for all."""
    rounds = [
        [measure(model.executor(), pp=0, tg=64, repeat=1)[0].tokens_per_second for model in models.values()]
        for _ in range(5)
    ]
    return [statistics.median(rates) for rates in zip(*rounds, strict=True)]


def _show(rows: list[dict[str, Any]]) -> None:
    base = rows[0]
    table = [
        (
            row["type"],
            megabytes(row["bytes"]),
            f"{base['bytes'] / row['bytes']:.2f}x",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.3f} ± {row['stderr']:.3f}",
            f"{100 * (row['perplexity'] / base['perplexity'] - 1):+.2f} %",
            f"{row['tokens_per_second']:.0f}",
        )
        for row in rows
    ]
    columns = ["type", "size", "smaller", "bits/weight", "perplexity", "against f16", "tokens/s"]
    show_table("the embedded model, opened at four types", columns, table)
