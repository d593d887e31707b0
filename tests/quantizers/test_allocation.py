"""The best types under a budget, against every possibility tried."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.quantizers.allocation import Choice, allocate

SIZES = st.integers(1, 1000)
LOSSES = st.floats(1e-9, 10.0)


@given(st.lists(st.lists(st.tuples(SIZES, LOSSES), min_size=1, max_size=4), min_size=1, max_size=4), st.floats(0, 1))
def test_no_other_choice_that_fits_is_better(tensors: list[list[tuple[int, float]]], share: float) -> None:
    choices = {
        f"t{i}": [Choice(f"k{j}", nbytes, loss) for j, (nbytes, loss) in enumerate(of)] for i, of in enumerate(tensors)
    }
    least = sum(min(c.nbytes for c in of) for of in choices.values())
    most = sum(max(c.nbytes for c in of) for of in choices.values())
    budget = least + int(share * (most - least))
    found = allocate(choices, budget)
    assert set(found) == set(choices)
    assert all(found[name] in of for name, of in choices.items())
    assert sum(c.nbytes for c in found.values()) <= budget
    possible = (every for every in itertools.product(*choices.values()) if sum(c.nbytes for c in every) <= budget)
    best = min(sum(c.loss for c in every) for every in possible)
    assert sum(c.loss for c in found.values()) <= best * 1.001 + 1e-8


def test_more_bytes_lose_no_more() -> None:
    choices = {f"t{i}": [Choice("a", 10, 1.0 + i), Choice("b", 20, 0.5), Choice("c", 40, 0.01 * i)] for i in range(40)}
    losses = [sum(c.loss for c in allocate(choices, budget).values()) for budget in (400, 600, 900, 1600)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(sum(0.01 * i for i in range(40)))


def test_losses_of_any_size() -> None:
    for scale in (1e-30, 1e-12, 1e12):
        choices = {f"t{i}": [Choice("a", 1, 3 * scale), Choice("b", 2, scale * i)] for i in range(3)}
        found = allocate(choices, 5)
        assert {name: c.type for name, c in found.items()} == {"t0": "b", "t1": "b", "t2": "a"}


def test_what_cannot_fit() -> None:
    with pytest.raises(QjaxError, match="the smallest types take 30 bytes, more than the 29"):
        allocate({"a": [Choice("x", 10, 1.0)], "b": [Choice("x", 20, 1.0)]}, 29)
