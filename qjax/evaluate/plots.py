"""Pictures of what quantization costs and saves."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from qjax.evaluate.labels import label
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
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=130)
    return path


# One hue for attention, one for the feed-forward network; in the order of the computation.
_OF_MATRIX = {
    "attn_q": ("#9ecae1", "o"),
    "attn_k": ("#6baed6", "s"),
    "attn_v": ("#2171b5", "^"),
    "attn_output": ("#08306b", "D"),
    "ffn_gate": ("#fdae6b", "o"),
    "ffn_up": ("#e6550d", "s"),
    "ffn_down": ("#7f2704", "D"),
}


def plot_errors(rows: list[dict[str, Any]], path: Path, *, title: str = "") -> Path:
    """What quantizing lost of each matrix, over the blocks, as a PNG; makes the folder if need be.

    Args:
      rows: dicts with block, name ("blk.0.attn_q.weight"), weight_error and output_error (None where none is known);
        those outside of the blocks (block -1) are not drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [("weight_error", "Weights")]
    if any(row["output_error"] is not None for row in rows):
        panels.insert(0, ("output_error", "Outputs, on the calibration data"))
    figure = Figure(figsize=(1.5 + 5.2 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for axes, (key, name) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for matrix, (color, marker) in _OF_MATRIX.items():
            of = [
                (row["block"], row[key]) for row in rows if row["name"].split(".")[-2] == matrix and row["block"] >= 0
            ]
            at = np.array([(block, error) for block, error in of if error], np.float64).reshape(-1, 2)
            if at.size:
                axes.plot(*at.T, marker=marker, color=color, markersize=4.5, linewidth=1, label=matrix)
        axes.set(yscale="log", title=name, xlabel="block", ylabel="mean square error / mean square (log scale)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.6, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return _saved(figure, path)


# A divergence below this is the rounding of the base's stored predictions.
_LEAST_KLD = 1e-6
_FRONT, _OTHER, _BASE = "#1f5fa8", "#8c8c8c", "#444444"


def plot_comparison(rows: list[dict[str, Any]], path: Path, *, base_perplexity: float, title: str = "") -> Path:
    """KL divergence and perplexity over bytes, with the Pareto front, as a PNG; makes the folder if need be.

    A perplexity far above all others stands at the upper edge, with its value beside its name.

    Args:
      rows: dicts with model, bytes, perplexity, mean_kld, kld_stderr, base and pareto; the base is drawn as a line.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row["base"]]
    names = without_common_start([row["model"] for row in shown])
    size, unit = _sizes(shown)
    front = np.array([row["pareto"] for row in shown], np.bool_)
    kld = np.maximum([row["mean_kld"] for row in shown], _LEAST_KLD)
    ppl = np.array([row["perplexity"] for row in shown], np.float64)
    beyond = _far_above(ppl, base_perplexity)
    named = [f"{name} ({value:.4g})" if far else name for name, value, far in zip(names, ppl, beyond, strict=True)]
    within = np.append(ppl[~beyond], base_perplexity)
    low, high = within.min(), within.max()
    room = 0.05 * max(high - low, 1e-3 * base_perplexity)
    ppl = np.where(beyond, high + room, ppl)

    width = 13.0 if len(rows) <= 16 else 17.0
    figure = Figure(figsize=(width, 0.5 * width), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    left, right = figure.subplots(1, 2)
    errors = [row["kld_stderr"] for row in shown]
    left.errorbar(size, kld, errors, fmt="none", ecolor="#c4c4c4", elinewidth=1, zorder=1)
    left.plot(size[front], kld[front], "-", color=_FRONT, linewidth=1, zorder=1.5)
    left.set(yscale="log", title="KL divergence to the base", ylabel="mean, nats a token (log scale)")
    right.axhline(base_perplexity, color=_BASE, linestyle="--", linewidth=1, label=f"base: {base_perplexity:.4f}")
    right.set(title="Perplexity", ylabel="perplexity", ylim=(low - 2 * room, high + 2 * room))
    for axes, values, high_up in ((left, kld, np.zeros_like(beyond)), (right, ppl, beyond)):
        for those, color, legend in ((front, _FRONT, "fewest bytes for its divergence"), (~front, _OTHER, None)):
            style = {"color": color, "markersize": 5.5, "zorder": 2}
            axes.plot(size[those & ~high_up], values[those & ~high_up], "o", label=legend, **style)
            axes.plot(size[those & high_up], values[those & high_up], "^", **style)
        _size_axis(axes, size, unit)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", fontsize=8, frameon=False)
    # The layout is final before the names are placed.
    figure.draw_without_rendering()
    base_line = np.array([[x, base_perplexity] for x in right.get_xlim()])
    for axes, values, words, line in ((left, kld, names, None), (right, ppl, named, base_line)):
        at = np.stack([size, values], axis=-1)
        for text, on_front in zip(label(axes, at, words, line=at[front] if line is None else line), front, strict=True):
            text.set_color(_FRONT if on_front else "#333333")
    return _saved(figure, path)


def _sizes(rows: list[dict[str, Any]]) -> tuple[np.ndarray, str]:
    nbytes = np.array([row["bytes"] for row in rows], np.float64)
    return (nbytes / 2**30, "GiB") if nbytes.max(initial=0) >= 2**31 else (nbytes / 2**20, "MiB")


def _size_axis(axes: Any, size: np.ndarray, unit: str) -> None:
    """Sizes that differ much on a log scale, since most of them are small."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xlabel(f"size, {unit}")
    if size.size and size.max() > 4 * size.min():
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _far_above(ppl: np.ndarray, base: float) -> np.ndarray:
    """Three times as far above the base as nine of ten, and by 30 %: it would press all others flat."""
    most = float(np.quantile(ppl, 0.9, method="lower")) if ppl.size else base
    return ppl > max(1.3 * base, base + 3 * (most - base))


def without_common_start(names: list[str]) -> list[str]:
    """Names less the words that all begin with: a family's name says nothing beside each point."""
    if len(names) < 2:
        return names
    # Names lie between the least and the greatest, so what these two share all share.
    least, greatest = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))
    # Not at "_", which is within a type's name; nor within a number.
    cut = max((found.end() for found in re.finditer(r"[-/ ]|\.(?=\D)", least) if found.end() <= same), default=0)
    return [name[cut:] for name in names]
