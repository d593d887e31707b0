"""Which type each tensor gets so that the whole fits a budget of bytes and loses least.

Losses add up (KL divergences of independent small errors do), so this is the multiple-choice knapsack problem, solved
to a ten-thousandth of the optimum by SciPy's HiGHS.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from qjax.errors import QjaxError, QjaxWarning


class Choice(NamedTuple):
    """A type for a tensor: the bytes it takes and what it loses."""

    type: str
    nbytes: int
    loss: float


_GAP, _SECONDS = 1e-4, 60.0


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice a tensor, together of at most `budget` bytes, with the least sum of losses.

    Raises:
      QjaxError: even the smallest choices do not fit; says what they take.
    """
    least = sum(min(choice.nbytes for choice in of) for of in choices.values())
    if least > budget:
        raise QjaxError(f"the smallest types take {least:,} bytes, more than the {budget:,} that are left for weights")
    names = list(choices)
    tensor = np.repeat(np.arange(len(names)), [len(choices[name]) for name in names])
    flat = [choice for name in names for choice in choices[name]]
    losses = np.array([choice.loss for choice in flat])
    nbytes = np.array([choice.nbytes for choice in flat], np.float64)
    one_each = sparse.csr_array((np.ones(len(flat)), (tensor, np.arange(len(flat)))))
    # Both in numbers near one: the solver's tolerances are absolute.
    cost = losses / max(sum(min(c.loss for c in of) for of in choices.values()), losses.max() * 1e-9, 1e-300)
    found = milp(
        cost,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes[None] / budget, 0, 1)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.status == 1:
        warnings.warn(
            f"the best types were not found within {_SECONDS:.0f} s: these may lose more", QjaxWarning, stacklevel=2
        )
    if found.x is None:
        raise QjaxError(f"no choice of types was found for {budget:,} bytes: {found.message}")
    chosen = {names[tensor[i]]: flat[i] for i in np.flatnonzero(found.x > 0.5)}
    return _within(chosen, choices, budget)


def _within(chosen: dict[str, Choice], choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """The solver's tolerance may let some bytes too many through: give up what costs least."""
    while sum(choice.nbytes for choice in chosen.values()) > budget:
        smaller = [
            ((other.loss - now.loss) / (now.nbytes - other.nbytes), name, other)
            for name, now in chosen.items()
            for other in choices[name]
            if other.nbytes < now.nbytes
        ]
        _, name, other = min(smaller)
        chosen = chosen | {name: other}
    return chosen
