"""Pictures of what quantization costs and saves."""

from pathlib import Path
from typing import Any

import numpy as np

from qjax.formats.atomic import atomic_file


def plot_types(rows: list[dict[str, Any]], path: Path) -> Path:
    """Size and perplexity of one model at several types, as a PNG; makes the folder if need be.

    Args:
      rows: dicts with type, bytes, perplexity and stderr; the first is the float one.
    """
    # Imported here, with a backend that needs no display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [row["type"] for row in rows]
    size = np.array([row["bytes"] for row in rows]) / 2**20
    ppl = np.array([row["perplexity"] for row in rows])
    x = np.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    bars = left.bar(x, size, color="#4c72b0", width=0.6)
    left.bar_label(bars, [f"{value:.2f}" for value in size], padding=2)
    left.set(title="Memory", ylabel="MiB of weights", ylim=(0, size.max() * 1.15))
    change = 100 * (ppl / ppl[0] - 1)
    bars = right.bar(x, change, color="#dd8452", width=0.6)
    right.bar_label(bars, [f"{value:+.2f} %\n({p:.2f})" for value, p in zip(change, ppl, strict=True)], padding=2)
    low, high = min(change.min(), 0.0), max(change.max(), 0.1)
    right.set(title="Perplexity against float16", ylabel="change, %", ylim=(low * 1.6 - 0.05, high * 1.4))
    right.axhline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set_xticks(x, names)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    plt.close(figure)
    return path
