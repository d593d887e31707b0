"""What vs_llamacpp.py makes of its samples: ratios, tables, a plot."""

import statistics
from pathlib import Path
from typing import Any

TESTS = ("tg", "pp")
# What qjax wants to reach: its tokens a second over llama.cpp's.
TARGETS: dict[str, dict[str, float]] = {
    "tg": {"q4_0": 1.30, "q8_0": 1.25, "q4_k_m": 1.15, "q6_k": 1.15},
    "pp": {"q4_0": 1.5, "q8_0": 1.8, "q4_k_m": 1.2, "q6_k": 1.3},
}
# A type that llama.cpp has not: 4 bits, groups of 128 with a float16 scale and a zero point, as GPTQ's files have.
INT4 = "int4 g128"
INT4_PEER = "q4_0"


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def best_flash(samples: list[dict[str, float]]) -> str:
    """The setting of flash attention ("0" or "1") with the higher median."""
    return max(samples[0], key=lambda flash: statistics.median(sample[flash] for sample in samples))


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each type and test that both sides ran; decoding first."""
    rows = []
    for test in TESTS:
        for name, tests in result["samples"].items():
            if "llama.cpp" not in tests[test]:
                continue
            ours, theirs = tests[test]["qjax"], tests[test]["llama.cpp"]
            flash = best_flash(theirs)
            best = [sample[flash] for sample in theirs]
            ratio, target = paired_ratio(ours, best), TARGETS[test].get(name)
            row = {
                "type": name,
                "test": f"{test}{result['tokens'][test]}",
                "qjax": statistics.median(ours),
                "llama.cpp": statistics.median(best),
                "flash_attention": flash == "1",
                "ratio": ratio,
                "ratio_of_medians": statistics.median(ours) / statistics.median(best),
                "target": target,
                "met": None if target is None else ratio >= target,
            }
            rows.append(row | (reading(result, name, row["qjax"]) if test == "tg" else {}))
    return rows


def int4_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The type that llama.cpp has not, against both sides' q4_0."""
    rows = []
    for test in TESTS if INT4 in result["samples"] else ():
        ours, base = result["samples"][INT4][test]["qjax"], result["samples"][INT4_PEER][test]
        flash = best_flash(base["llama.cpp"])
        row = {
            "type": INT4,
            "test": f"{test}{result['tokens'][test]}",
            "qjax": statistics.median(ours),
            "against_qjax": paired_ratio(ours, base["qjax"]),
            "against_llamacpp": paired_ratio(ours, [sample[flash] for sample in base["llama.cpp"]]),
        }
        rows.append(row | (reading(result, INT4, row["qjax"]) if test == "tg" else {}))
    return rows


def reading(result: dict[str, Any], name: str, rate: float) -> dict[str, float]:
    """What decoding at this rate reads, against what the memory can give."""
    touched = result["touched"][name]
    return {
        "touched": touched,
        "bytes_per_second": rate * touched,
        "of_bandwidth": rate * touched / result["bandwidth"],
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reading_cells(row: dict[str, Any]) -> list[str]:
    if "touched" not in row:
        return ["", "", ""]
    bandwidth = f"{100 * row['of_bandwidth']:.0f} %"
    return [f"{row['touched'] / 1e6:.0f}", f"{row['bytes_per_second'] / 1e9:.1f}", bandwidth]


def report(result: dict[str, Any]) -> str:
    """Where it ran, and the tables."""
    versions = result["versions"]
    lead = [
        f"{result['machine']}, {result['threads']} threads; {result['shape']}, activations {result['activations']}",
        f"qjax {versions['qjax']}, jax {versions['jax']}, llama.cpp {versions['llama.cpp']}",
        f"llama.cpp's build: {versions['llama.cpp system'] or 'unknown'}",
        f"read bandwidth {result['bandwidth'] / 1e9:.1f} GB/s",
    ]
    reads = ["MB a token", "GB/s", "of the bandwidth"]
    names = ["type", "test", "qjax tok/s", "llama.cpp tok/s", "ratio", "of medians", "target", *reads]
    cells = []
    for row in rows_of(result):
        target = "" if row["target"] is None else f"{row['target']:.2f} {'met' if row['met'] else 'missed'}"
        flash = "fa" if row["flash_attention"] else "no fa"
        speeds = [f"{row['qjax']:.2f}", f"{row['llama.cpp']:.2f} ({flash})"]
        ratios = [f"{row['ratio']:.2f}x", f"{row['ratio_of_medians']:.2f}x", target]
        cells.append([row["type"], row["test"], *speeds, *ratios, *_reading_cells(row)])
    parts = [*lead, "", table(names, cells)]
    if extra := int4_rows(result):
        names = ["type", "test", "qjax tok/s", f"against qjax {INT4_PEER}", f"against llama.cpp {INT4_PEER}", *reads]
        cells = [
            [row["type"], row["test"], f"{row['qjax']:.2f}"]
            + [f"{row[key]:.2f}x" for key in ("against_qjax", "against_llamacpp")]
            + _reading_cells(row)
            for row in extra
        ]
        parts += ["", table(names, cells)]
    return "\n".join(parts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of both sides, decoding on the left, prompts on the right."""
    from matplotlib.figure import Figure

    rows = rows_of(result)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, test in zip(figure.subplots(1, 2), TESTS, strict=True):
        shown = [row for row in rows if row["test"].startswith(test)]
        for shift, side, color in ((-0.2, "llama.cpp", "#8c8c8c"), (0.2, "qjax", "#4c72b0")):
            at = [i + shift for i in range(len(shown))]
            bars = axes.bar(at, [row[side] for row in shown], 0.38, color=color, label=side)
            ratio = side == "qjax"
            labels = [f"{row[side]:.1f}" + (f"\n{row['ratio']:.2f}x" if ratio else "") for row in shown]
            axes.bar_label(bars, labels, padding=2, fontsize=8)
        title = "Decoding" if test == "tg" else "Prompt"
        axes.set(title=f"{title} ({test}{result['tokens'][test]})", ylabel="tokens a second")
        axes.set_ylim(0, 1.22 * max(max(row["qjax"], row["llama.cpp"]) for row in shown))
        axes.set_xticks(range(len(shown)), [row["type"] for row in shown])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", ncols=2)
    figure.suptitle(f"{result['shape']}, {result['threads']} threads, {result['machine']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
