"""Pictures: whole files, and nothing in them that cannot be read."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from qjax.evaluate.plots import plot_comparison, plot_types, without_common_start

SIZES = {"f16": 7349248, "q8_0": 3905536, "q5_1": 2763776, "q4_0": 2073600}


def rows(*values: float) -> list[dict[str, Any]]:
    return [
        {"type": kind, "bytes": size, "perplexity": value, "stderr": 0.61}
        for (kind, size), value in zip(SIZES.items(), values, strict=False)
    ]


CASES = {
    "worse and worse": rows(21.83, 21.9, 21.98, 22.84),
    "better than the float one": rows(67.7, 67.3, 66.9, 67.75),
    "a little better": rows(21.83, 21.829, 22.33, 42.0),
    "all better": rows(67.7, 60.0, 61.0, 62.0),
    "no difference": rows(20.0, 20.0, 20.0, 20.0),
    "one is broken": rows(21.83, 21.84, 28811.9, 22.84),
    "two": rows(9.0, 9.1),
    "the first alone": rows(9.0),
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.mark.parametrize("case", CASES)
def test_every_label_can_be_read(case: str, figures: list[Figure], tmp_path: Path) -> None:
    """Within the picture, clear of each other and of the frame, whichever way the bars go."""
    path = plot_types(CASES[case], tmp_path / "types.png")
    assert path == tmp_path / "types.png"
    assert imread(path).shape[2] == 4
    (figure,) = figures
    # Laid out anew: it was saved at another resolution.
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [*axes.texts, axes.title, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
        low, high = axes.get_ylim()
        # Ticks beyond the limits are not drawn.
        shown = [t for t in labels if t.get_text() and (t not in axes.get_yticklabels() or low <= t._y <= high)]
        boxes = [text.get_window_extent() for text in shown]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        for (a, box), (b, other) in combinations(zip(shown, boxes, strict=True), 2):
            assert not box.overlaps(other), f"{a.get_text()!r} lies over {b.get_text()!r}"
        frame = axes.get_window_extent()
        for text in axes.texts:
            if text.get_text():
                box = text.get_window_extent()
                assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, text.get_text()


def test_says_what_was_measured(figures: list[Figure], tmp_path: Path) -> None:
    plot_types(CASES["worse and worse"], tmp_path / "types.png")
    memory, change = figures[0].axes
    assert [bar.get_height() for bar in memory.patches] == [size / 2**20 for size in SIZES.values()]
    assert "1.98\n3.54x smaller" in [text.get_text() for text in memory.texts]
    expected = np.round([0.0, 100 * (21.9 / 21.83 - 1), 100 * (21.98 / 21.83 - 1), 100 * (22.84 / 21.83 - 1)], 2)
    assert [bar.get_height() for bar in change.patches] == pytest.approx(expected)
    assert change.get_xticklabels()[3].get_text() == "q4_0\n22.84\n± 0.61"


def test_is_a_png_in_a_new_folder_and_nothing_else(tmp_path: Path) -> None:
    path = plot_types(rows(9.0, 9.1), tmp_path / "new" / "folder" / "picture")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plot_types(rows(9.0, 9.1), tmp_path / "types.png")
    before = path.read_bytes()

    def half(self: Figure, stream: Any, **options: Any) -> None:
        stream.write(before[:100])
        raise RuntimeError("cut off")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RuntimeError, match="cut off"):
        plot_types(rows(9.0, 9.2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def compared(*entries: tuple[str, int, float, float]) -> list[dict[str, Any]]:
    """Rows of (model, bytes, KLD, perplexity), the first the base; on the front as they come nearer to it."""
    found, nearest = [], np.inf
    for name, nbytes, kld, ppl in sorted(entries[1:], key=lambda entry: entry[1:3]):
        found.append(
            {
                "model": f"tiny-{name}",
                "bytes": nbytes,
                "mean_kld": kld,
                "kld_stderr": 0.02 * abs(kld),
                "perplexity": ppl,
            }
            | {"base": False, "pareto": kld < nearest}
        )
        nearest = min(nearest, kld)
    name, nbytes, kld, ppl = entries[0]
    base = {"model": f"tiny-{name}", "bytes": nbytes, "mean_kld": kld, "kld_stderr": 0.0, "perplexity": ppl}
    return [*found, base | {"base": True, "pareto": False}]


F16 = ("f16", 8443904, 0.0, 33.154)
# Sizes, divergences and perplexities of one small model's files, by llama-perplexity.
TWELVE = compared(
    F16,
    ("q8_0", 4511744, 0.000106, 33.159),
    ("q6_K", 3495936, 0.000596, 33.202),
    ("q5_K_M", 3069440, 0.001471, 33.191),
    ("q5_K_S", 3008512, 0.001496, 33.195),
    ("q4_K_M", 2668032, 0.004113, 33.293),
    ("imat-q4_K_M", 2668224, 0.004097, 33.404),
    ("q4_K_S", 2566144, 0.004075, 33.296),
    ("q4_0", 2549760, 0.005724, 33.161),
    ("iq4_nl", 2549760, 0.005718, 33.226),
    ("iq4_xs", 2435072, 0.005745, 33.221),
    ("q3_K_M", 2227200, 0.014172, 33.995),
    ("q3_K_S", 2062336, 0.018974, 33.969),
    ("q2_K", 1809408, 0.068015, 35.65),
    ("iq1_s", 1236160, 0.154066, 36.65),
    ("tq1_0", 1443840, 1.119625, 84.545),
)
CROWD = compared(
    F16, *((f"kind-{i}", 2_000_000 + 9000 * i, 0.01 / (1 + i % 7), 33.3 + 0.02 * (i % 5)) for i in range(30))
)
COMPARED = {
    "twelve and more": TWELVE,
    "thirty in a crowd": CROWD,
    "one": compared(F16, ("q8_0", 4511744, 0.000106, 33.159)),
    "of float weights": compared(F16, ("bf16", 8443904, -1e-7, 33.154), ("f16-again", 8443904, 0.0, 33.154)),
    "the base alone": compared(F16),
    "gigabytes": compared(("f16", 2**34, 0.0, 6.0), ("q8_0", 2**33, 1e-4, 6.01), ("a$b$_", 2**32, 3e-2, 6.3)),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if "twelve" in c else c for c in COMPARED])
def test_every_model_is_named_in_both_pictures(case: str, figures: list[Figure], tmp_path: Path) -> None:
    """In the frame, clear of each other, of the legend and of the points."""
    rows = COMPARED[case]
    path = plot_comparison(rows, tmp_path / "compare.png", base_perplexity=33.154, title="text: 9 chunks")
    assert imread(path).shape[2] == 4
    (figure,) = figures
    figure.draw_without_rendering()
    others = [row for row in rows if not row["base"]]
    for axes in figure.axes:
        names = [text for text in axes.texts if text.get_text()]
        assert len(names) == len(others)
        frame, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
        boxes = [Text.get_window_extent(text) for text in names]
        for box in boxes:
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
            assert not box.overlaps(legend)
        for (a, box), (b, other) in combinations(zip(names, boxes, strict=True), 2):
            assert not box.overlaps(other), f"{a.get_text()!r} lies over {b.get_text()!r}"
        points = [at for line in axes.lines if line.get_marker() in ("o", "^") for at in line.get_xydata()]
        assert len(points) == len(others)
        for at in axes.transData.transform(points) if points else []:
            for text, box in zip(names, boxes, strict=True):
                assert not box.contains(*at), f"{text.get_text()!r} lies over a point"


def test_a_name_far_from_its_point_has_a_line_to_it(figures: list[Figure], tmp_path: Path) -> None:
    rows = compared(F16, *((f"kind-{i}", 2_000_000, 0.01, 33.3) for i in range(20)))
    plot_comparison(rows, tmp_path / "compare.png", base_perplexity=33.154)
    (figure,) = figures
    for axes in figure.axes:
        shown = [text.arrow_patch.get_visible() for text in axes.texts]
        assert any(shown)
        assert not all(shown)


def test_a_broken_model_does_not_press_the_others_flat(figures: list[Figure], tmp_path: Path) -> None:
    """Its value stands beside its name, at the upper edge."""
    plot_comparison(TWELVE, tmp_path / "compare.png", base_perplexity=33.154)
    kld, perplexity = figures[0].axes
    assert 36.65 < perplexity.get_ylim()[1] < 40
    names = [text.get_text() for text in perplexity.texts]
    assert "tq1_0 (84.55)" in names
    assert "tq1_0" in [text.get_text() for text in kld.texts]
    (far,) = [line for line in perplexity.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert far.get_xdata() == pytest.approx([1443840 / 2**20])
    assert perplexity.get_ylim()[0] < far.get_ydata()[0] < perplexity.get_ylim()[1]
    # Bad models are shown as they are where they are not alone.
    plot_comparison(TWELVE[:2], tmp_path / "compare.png", base_perplexity=33.154)
    assert figures[1].axes[1].get_ylim()[1] > 36.65


def test_the_front_is_a_line(figures: list[Figure], tmp_path: Path) -> None:
    plot_comparison(TWELVE, tmp_path / "compare.png", base_perplexity=33.154)
    front = [row for row in TWELVE if row["pareto"]]
    line = next(line for line in figures[0].axes[0].lines if line.get_linestyle() == "-")
    np.testing.assert_allclose(line.get_xdata(), [row["bytes"] / 2**20 for row in front])
    np.testing.assert_allclose(line.get_ydata(), [row["mean_kld"] for row in front])
    dashed = next(line for line in figures[0].axes[1].lines if line.get_linestyle() == "--")
    assert set(dashed.get_ydata()) == {33.154}


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["tiny-q4_0", "tiny-q4_1"], ["q4_0", "q4_1"]),
        (["Llama-3.1-8B-Q4_K_M", "Llama-3.1-8B-Q4_K_S"], ["Q4_K_M", "Q4_K_S"]),
        (["phi.Q4_K_M", "phi.Q4_K_S"], ["Q4_K_M", "Q4_K_S"]),
        (["Llama-3.1", "Llama-3.2"], ["3.1", "3.2"]),
        (["model", "model-q4_0"], ["model", "model-q4_0"]),
        (["a", "b"], ["a", "b"]),
        (["a-b"], ["a-b"]),
        ([], []),
    ],
)
def test_what_all_names_begin_with_is_left_out(names: list[str], short: list[str]) -> None:
    assert without_common_start(names) == short


def test_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    """No backend is chosen for the caller (a notebook has its own), and no figure is kept."""
    import matplotlib
    from matplotlib import pyplot as plt

    before = matplotlib.get_backend()
    plot_types(rows(9.0, 9.1), tmp_path / "types.png")
    assert matplotlib.get_backend() == before
    assert plt.get_fignums() == []
