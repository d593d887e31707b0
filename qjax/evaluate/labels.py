"""Names beside the points of a plot, such that none lies over another, a point or a line."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

# Where a label may lie, in points from what it names: near ones are tried first.
_RADII = (5.0, 12.0, 20.0, 29.0, 39.0, 50.0, 62.0, 75.0, 90.0, 110.0)
_ANGLES = np.arange(16) * (np.pi / 8)
# A label this far off has a line to its point.
_LEADER = 10.0
# What is worse than any distance, and how much: lying over a name or out of the frame, over a point, over a line.
_OVER_LABEL, _OVER_POINT, _OVER_LINE = 1e4, 1e3, 60.0


class Boxes(NamedTuple):
    """Rectangles in pixels, low and high corners."""

    low: Float64[np.ndarray, "n 2"]
    high: Float64[np.ndarray, "n 2"]

    def overlap(self, other: "Boxes") -> Bool[np.ndarray, "n m"]:
        return np.all((self.low[:, None] < other.high) & (other.low < self.high[:, None]), axis=-1)

    def hold(self, points: Float64[np.ndarray, "m 2"]) -> Bool[np.ndarray, "n m"]:
        return np.all((self.low[:, None] < points) & (points < self.high[:, None]), axis=-1)


def place(
    points: Float64[np.ndarray, "n 2"],
    sizes: Float64[np.ndarray, "n 2"],
    frame: Boxes,
    *,
    line: Float64[np.ndarray, "m 2"],
    taken: Boxes,
    point: float,
    marker: float = 4.0,
) -> Float64[np.ndarray, "n 2"]:
    """Centres of labels: each takes, in turn, the place that costs least beside those that are there already.

    Args:
      points: what is named, in pixels.
      sizes: width and height of each name in pixels.
      frame: one box in which the labels shall lie.
      line: points along what is drawn besides, such as a curve.
      taken: where no label shall lie.
      point: pixels of a typographic point.
      marker: radius of a drawn point, in typographic points.

    Returns:
      [n, 2], pixels.
    """
    centres = np.zeros_like(points)
    placed = taken
    drawn = line
    # Crowded ones first: they have the least choice.
    apart = np.abs(points[:, None] - points).sum(axis=-1)
    for i in np.argsort(np.sort(apart, axis=1)[:, : min(4, len(points))].sum(axis=1), kind="stable"):
        tried, cost = _candidates(points[i], sizes[i], point)
        boxes = Boxes(tried - sizes[i] / 2 - point, tried + sizes[i] / 2 + point)
        outside = (boxes.low < frame.low).any(axis=-1) | (boxes.high > frame.high).any(axis=-1)
        cost = cost + _OVER_LABEL * (boxes.overlap(placed).sum(axis=1) + outside)
        reach = Boxes(boxes.low - marker * point, boxes.high + marker * point)
        cost += _OVER_POINT * reach.hold(points).sum(axis=1) + _OVER_LINE * boxes.hold(drawn).any(axis=1)
        leaders = _along(points[i], tried)
        others = points[(np.abs(points - points[i]) > marker * point).any(axis=-1)]
        crossed = (np.abs(leaders[:, :, None] - others) < marker * point).all(axis=-1).any(axis=-1).any(axis=-1)
        cost += _OVER_POINT / 4 * crossed
        for j in range(len(tried)):
            cost[j] += _OVER_POINT * placed.hold(leaders[j]).any()
        best = int(cost.argmin())
        centres[i] = tried[best]
        placed = Boxes(
            np.concatenate([placed.low, boxes.low[best : best + 1]]),
            np.concatenate([placed.high, boxes.high[best : best + 1]]),
        )
        drawn = np.concatenate([drawn, leaders[best]])
    return centres


def _candidates(
    at: Float64[np.ndarray, "2"], size: Float64[np.ndarray, "2"], point: float
) -> tuple[Float64[np.ndarray, "k 2"], Float64[np.ndarray, " k"]]:
    """Centres around a point, and their distances in typographic points, counted from the label's edge or corner."""
    angle, radius = (grid.ravel() for grid in np.meshgrid(_ANGLES, np.array(_RADII)))
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    # Of equal ones the right, then the one above is taken.
    preferred = radius + 0.5 * (1 - direction[:, 0]) + 0.2 * (1 - direction[:, 1])
    return at + direction * radius[:, None] * point + np.clip(1.5 * direction, -1, 1) * size / 2, preferred


def _along(start: Float64[np.ndarray, "2"], ends: Float64[np.ndarray, "k 2"]) -> Float64[np.ndarray, "k 24 2"]:
    share = np.linspace(0.08, 0.92, 24)[:, None]
    return start + share * (ends[:, None] - start)


def label(
    axes: Any, points: Float64[np.ndarray, "n 2"], names: Sequence[str], *, line: Float64[np.ndarray, "m 2"]
) -> list[Any]:
    """Write names beside points of a finished axes (limits and legend set, laid out); gives the texts.

    Args:
      points: in the axes' data; a name never lies over one as long as there is room.
      line: points along a curve of the axes, which names keep off where they can.
    """
    leader = {"arrowstyle": "-", "linewidth": 0.6, "color": "#999999", "shrinkA": 1, "shrinkB": 3}
    style = {
        "ha": "center",
        "va": "center",
        "fontsize": 8,
        "annotation_clip": False,
        "parse_math": False,
        "arrowprops": leader,
    }
    texts = [axes.annotate(name, at, xytext=at, **style) for name, at in zip(names, points, strict=True)]
    if not texts:
        return texts
    for text in texts:
        text.set_in_layout(False)
    point = axes.figure.dpi / 72
    sizes = np.array([text.get_window_extent().size for text in texts])
    bounds = axes.get_window_extent()
    frame = Boxes(np.array([bounds.p0]), np.array([bounds.p1]))
    legend = axes.get_legend().get_window_extent()
    taken = Boxes(np.array([legend.p0]), np.array([legend.p1]))
    pixels = axes.transData.transform(points)
    curve = _dense(axes.transData.transform(line))
    centres = place(pixels, sizes, frame, line=curve, taken=taken, point=point)
    for text, at, centre, size in zip(texts, pixels, centres, sizes, strict=True):
        text.set_position(axes.transData.inverted().transform(centre))
        gap = np.maximum(np.abs(centre - at) - size / 2, 0)
        text.arrow_patch.set_visible(bool(np.hypot(*gap) > _LEADER * point))
    return texts


def _dense(path: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "m 2"]:
    """Points every few pixels along a path."""
    if len(path) < 2:
        return path
    pieces = [np.linspace(a, b, max(int(np.abs(b - a).max() / 4), 2)) for a, b in itertools.pairwise(path)]
    return np.concatenate(pieces)
