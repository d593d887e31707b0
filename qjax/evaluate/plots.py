"""Pictures of what quantization costs and saves."""

from pathlib import Path
from typing import Any

import numpy as np

from qjax.formats.atomic import atomic_file


def plot_types(rows: list[dict[str, Any]], path: Path) -> Path:
    """Size and perplexity of one model at several types, as a PNG; makes the folder if need be.

    Args:
      rows: dicts with type, bytes, perplexity and stderr; the first is the one that the others are compared with.
    """
    # Imported here: it takes half a second. A Figure without pyplot needs no display and changes no backend.
    from matplotlib.figure import Figure

    names = [row["type"] for row in rows]
    size = np.array([row["bytes"] for row in rows]) / 2**20
    ppl = np.array([row["perplexity"] for row in rows])
    # Rounded as they are shown; adding zero turns -0.0 into 0.0.
    change = np.round(100 * (ppl / ppl[0] - 1), 2) + 0.0
    x = np.arange(len(rows))
    colors = ["#8c8c8c"] + ["#4c72b0"] * (len(rows) - 1)
    figure = Figure(figsize=(max(9.0, 2.1 * len(rows)), 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)

    bars = left.bar(x, size, color=colors, width=0.6)
    smaller = [f"{size[0]:.2f}", *(f"{value:.2f}\n{size[0] / value:.2f}x smaller" for value in size[1:])]
    left.bar_label(bars, smaller, padding=3, fontsize=9)
    left.set(title="Memory", ylabel="MiB of weights", ylim=(0, size.max() * 1.2))
    left.set_xticks(x, names)

    bars = right.bar(x, change, color=colors, width=0.6)
    right.bar_label(bars, ["", *(f"{value:+.2f} %" for value in change[1:])], padding=3, fontsize=9)
    # At least 1 %, so that next to nothing looks it; room for labels above and, where a bar hangs down, below.
    low, high = min(change.min(), 0.0), max(change.max(), 1.0)
    room = 0.15 * (high - low)
    right.set(title=f"Perplexity against {names[0]}", ylabel="change, %")
    right.set_ylim(low - room if low < 0 else 0.0, high + room)
    right.axhline(0, color="black", linewidth=0.8)
    errors = [row["stderr"] for row in rows]
    right.set_xticks(x, [f"{name}\n{p:.2f}\n± {e:.2f}" for name, p, e in zip(names, ppl, errors, strict=True)])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    return path
