"""Labels keep off each other, off points, lines and what is taken, as long as there is room."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.evaluate.labels import Boxes, place

FRAME = Boxes(np.array([[0.0, 0.0]]), np.array([[600.0, 500.0]]))
TAKEN = Boxes(np.array([[450.0, 450.0]]), np.array([[600.0, 500.0]]))
NO_LINE = np.zeros((0, 2))


def boxes_of(points: np.ndarray, size: tuple[float, float] = (50.0, 12.0), line: np.ndarray = NO_LINE) -> Boxes:
    sizes = np.broadcast_to(np.array(size), points.shape)
    centres = place(points, sizes, FRAME, line=line, taken=TAKEN, point=1.0)
    return Boxes(centres - sizes / 2, centres + sizes / 2)


@given(st.lists(st.tuples(st.integers(20, 580), st.integers(20, 480)), min_size=1, max_size=12))
@settings(max_examples=60)
def test_where_there_is_room_nothing_is_covered(places: list[tuple[int, int]]) -> None:
    points = np.array(places, np.float64)
    boxes = boxes_of(points)
    assert not (boxes.overlap(boxes) & ~np.eye(len(points), dtype=bool)).any()
    assert not boxes.overlap(TAKEN).any()
    assert not boxes.hold(points).any()
    assert (boxes.low >= FRAME.low).all()
    assert (boxes.high <= FRAME.high).all()


def test_one_stands_at_the_right_of_its_point() -> None:
    boxes = boxes_of(np.array([[300.0, 200.0]]))
    assert boxes.low[0, 0] == 305
    assert boxes.low[0, 1] < 200 < boxes.high[0, 1]


def test_at_the_edge_it_stands_at_the_other_side() -> None:
    assert boxes_of(np.array([[595.0, 200.0]])).high[0, 0] < 595
    assert boxes_of(np.array([[300.0, 497.0]])).high[0, 1] < 497


def test_keeps_off_a_line() -> None:
    line = np.stack([np.arange(0.0, 600.0, 4.0), np.full(150, 200.0)], axis=-1)
    boxes = boxes_of(np.array([[300.0, 200.0]]), line=line)
    assert not boxes.hold(line).any()


def test_without_any_room_all_are_placed_all_the_same() -> None:
    boxes = boxes_of(np.full((40, 2), 300.0), size=(400.0, 300.0))
    assert np.isfinite(boxes.low).all()
