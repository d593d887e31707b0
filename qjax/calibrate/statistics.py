"""What an importance matrix looks like, in the numbers of `llama-imatrix --show-statistics`."""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qjax.formats.gguf.imatrix import Importances

_LAYER = re.compile(r"blk\.(\d+)\.")
# Columns whose mean square is at most this are not active.
_SILENT = 1e-5


class Statistics(NamedTuple):
    """Of the mean squares a of one input's columns.

    names: of the weights that share it. total, least, most, mean, deviation: of a. active: the share of columns that
    have any. entropy: of a / total, as a share of the most it could be: 1 if all columns are alike. outlying: the share
    of columns that are more than a deviation above the mean. similarity: the cosine between these a and those of the
    layer before; None in the first.
    """

    names: tuple[str, ...]
    total: float
    least: float
    most: float
    mean: float
    deviation: float
    active: float
    entropy: float
    outlying: float
    similarity: float | None


def statistics(found: Importances) -> list[Statistics]:
    """A line an input, layer by layer; stacked experts count as one long input."""
    means = {name: values.astype(np.float64).ravel() for name, values in found.of.items()}
    shared: dict[tuple[int | None, bytes], list[str]] = {}
    for name, values in means.items():
        shared.setdefault((_layer(name), values.tobytes()), []).append(name)
    # What is of no layer is the output.
    order = sorted(shared, key=lambda key: (key[0] is None, key[0] or 0, shared[key][0]))
    return [_line(tuple(shared[key]), means) for key in order]


def _layer(name: str) -> int | None:
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


def _line(names: tuple[str, ...], means: dict[str, Float[np.ndarray, " n"]]) -> Statistics:
    a = means[names[0]]
    total, mean, deviation = float(a.sum()), float(a.mean()), float(a.std())
    share = a[a > 0] / total if total > 0 else a[:0]
    layer = _layer(names[0])
    before = None if layer is None else means.get(_LAYER.sub(f"blk.{layer - 1}.", names[0]))
    return Statistics(
        names=names,
        total=total,
        least=float(a.min()),
        most=float(a.max()),
        mean=mean,
        deviation=deviation,
        active=float((a > _SILENT).mean()),
        entropy=float(-(share * np.log2(share)).sum() / np.log2(max(a.size, 2))),
        outlying=float((a > mean + deviation).mean()) if deviation > 0 else 0.0,
        similarity=None if before is None or before.size != a.size else _cosine(a, before),
    )


def _cosine(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else 0.0
