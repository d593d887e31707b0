"""Pictures: whole files, and nothing in them that cannot be read."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from qjax.evaluate.plots import plot_types

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


def test_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    """No backend is chosen for the caller (a notebook has its own), and no figure is kept."""
    import matplotlib
    from matplotlib import pyplot as plt

    before = matplotlib.get_backend()
    plot_types(rows(9.0, 9.1), tmp_path / "types.png")
    assert matplotlib.get_backend() == before
    assert plt.get_fignums() == []
