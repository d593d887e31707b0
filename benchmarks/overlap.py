"""Who computes when: traces of several processes, taken by JAX's profiler, as one picture and as shares of the time."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

# XLA:CPU's name for a program that runs.
RUNS = "ThunkExecutor::Execute"
Spans = list[tuple[float, float]]


def busy(folder: Path) -> Spans:
    """Seconds since 1970, from and to, in which programs ran, in order and apart from each other."""
    from jax.profiler import ProfileData

    data = ProfileData.from_file(str(next(folder.rglob("*.xplane.pb"))))
    start = next(dict(plane.stats)["profile_start_time"] for plane in data.planes if plane.name == "Task Environment")
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == RUNS]
    spans: Spans = []
    for event in sorted(events, key=lambda event: event.start_ns):
        first = (start + event.start_ns) / 1e9
        last = first + event.duration_ns / 1e9
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    return spans


def shares(processes: list[Spans]) -> list[float]:
    """Of the time from the first program to the last: the share in which 0, 1, 2, ... processes compute."""
    edges = sorted((at, step) for spans in processes for a, b in spans for at, step in ((a, 1), (b, -1)))
    total, running, found = edges[-1][0] - edges[0][0], 0, np.zeros(len(processes) + 1)
    for (at, step), (following, _) in itertools.pairwise(edges):
        running += step
        found[running] += following - at
    return (found / total).tolist()


def middle(processes: list[Spans], seconds: float) -> list[Spans]:
    """So many seconds from the middle of the time, counted from their start."""
    ends = [at for spans in processes for span in spans for at in span]
    start = (min(ends) + max(ends) - seconds) / 2
    cut = lambda a, b: (max(a - start, 0.0), min(b - start, seconds))
    return [[cut(a, b) for a, b in spans if b > start and a < start + seconds] for spans in processes]


def picture(found: dict[str, list[Spans]], path: Path, seconds: float) -> None:
    """A row for each process of each run, coloured where it computes."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(found), 1, figsize=(9, 1.1 + 1.2 * len(found)), sharex=True, layout="constrained")
    for axis, (name, processes) in zip(np.atleast_1d(axes), found.items(), strict=True):
        for i, spans in enumerate(middle(processes, seconds)):
            axis.broken_barh([(1e3 * a, 1e3 * (b - a)) for a, b in spans], (i - 0.4, 0.8), color=f"C{i}")
        several = sum(shares(processes)[2:])
        axis.set_title(
            f"{name}: more than one process computes {100 * several:.0f} % of the time", loc="left", fontsize=10
        )
        axis.set_yticks(range(len(processes)), [f"process {i}" for i in range(len(processes))])
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[-1].set_xlabel("milliseconds")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def traced(folder: Path) -> Any:
    """A context in which JAX's profiler writes to the folder, without a line for each Python call."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return jax.profiler.trace(folder, profiler_options=options)
