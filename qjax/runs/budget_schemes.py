"""A scheme for each matrix under a budget: `qjax quantize --method gptq --target-bpw 3.5`.

As for GGUF's types (`runs.budget`): what each scheme costs each matrix, by its Fisher information and the error of
rounding to nearest, and the choice that fits and loses least. A method loses less than that, of all schemes.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from qjax.arrays import Scheme, parse_scheme
from qjax.calibrate.budget import choices, fit, stored
from qjax.calibrate.data import Calibration, calibration_tokens
from qjax.calibrate.fisher import each
from qjax.calibrate.recipes import Recipe
from qjax.errors import QjaxError
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.rules import ENDS, Rule, pattern
from qjax.formats.source import Source
from qjax.runs.budget import N_CTX, OWN_TEXT, Budget, chunks_for, look
from qjax.runs.console import progress_bar
from qjax.runs.texts import open_model

# What is chosen from, unless told; a matrix may also stay as it is.
SCHEMES = ("w2g32-asym", "w3g128", "w3g32-asym", "w4g128", "w4g32-asym", "w5g32", "w6g32", "w8")

Check = Callable[[Mapping[str, Scheme]], None]


class Within(NamedTuple):
    """A recipe whose rules name every matrix, the divergence that it is expected to cost (nats a token), and the chunks
    that the model was looked at on."""

    recipe: Recipe
    expected: float
    chunks: Int32[np.ndarray, "chunks n_ctx"]


def recipe_within(source: Source, recipe: Recipe, budget: Budget, calibration: Calibration, holds: Check) -> Within:
    """The recipe with a scheme for each matrix, so that all weights fit the budget and lose least.

    Args:
      recipe: its rules decide for the matrices that they fit.
      calibration: the text to look at the model on; without data it is text that the model writes.
      holds: raises UnsupportedError for schemes that the output's format does not hold.

    Raises:
      QjaxError: the budget is too small, or no scheme is left for a matrix.
    """
    of = candidates(source, recipe, budget, holds)
    rest = sum(stored(info.type, info.shape) for name, info in source.tensors.items() if name not in of)
    weights = sum(math.prod(info.shape) for info in source.tensors.values())
    left = (int(budget.bpw * weights / 8) if budget.bpw is not None else budget.nbytes or 0) - rest
    if left <= 0:
        raise QjaxError(f"{source.path}: what is kept takes {rest:,} bytes: the budget leaves nothing: give more")
    model = open_model(str(source.path))
    if calibration.data is None:
        chunks = chunks_for(model, budget)
    else:
        seq_len = min(N_CTX, model.config.context)
        wanted = calibration._replace(samples=budget.chunks, seq_len=seq_len)
        chunks = calibration_tokens(wanted, lambda: model.tokenizer, model.config)
    known = look(model, chunks, OWN_TEXT if calibration.data is None else "calibration data")
    del model
    with progress_bar("schemes tried", total=len(of)) as advance:
        best = fit(choices(source, of, each(known), {}, progress=lambda name: advance(note=name)), left)
    return Within(_with(recipe, best.types, source), best.divergence, chunks)


def candidates(source: Source, recipe: Recipe, budget: Budget, holds: Check) -> dict[str, list[str]]:
    """The schemes that each matrix may get, as texts; a float type of its own for one that may be kept.

    Raises:
      QjaxError: see `recipe_within`; a text that is no scheme.
    """
    texts = [str(parse_scheme(text.strip())) for text in budget.types or SCHEMES]
    by_rule = recipe.schemes(source)
    found: dict[str, list[str]] = {}
    for name, info in source.tensors.items():
        if len(info.shape) != 2 or info.type not in FLOAT_TYPES:
            continue
        if any(rule.fits(name) for rule in recipe.rules):
            found[name] = [str(by_rule[name]) if name in by_rule else info.type]
        elif name not in ENDS:
            fitting = [text for text in texts if _possible(name, info.shape[-1], parse_scheme(text), holds)]
            found[name] = [*fitting, info.type]
            if not fitting:
                raise QjaxError(f"{name}: none of {', '.join(texts)} is possible: name others by --types")
    return found


def _possible(name: str, columns: int, scheme: Scheme, holds: Check) -> bool:
    """Whether its groups divide a row, and the format holds it."""
    try:
        scheme.groups(columns)
        holds({name: scheme})
    except QjaxError:
        return False
    return True


def _with(recipe: Recipe, types: Mapping[str, str], source: Source) -> Recipe:
    """The recipe with a rule for each matrix."""
    weights = Counter[str]()
    for name, kind in types.items():
        weights[kind] += math.prod(source.tensors[name].shape)
    schemes = {name: None if kind in FLOAT_TYPES else parse_scheme(kind) for name, kind in types.items()}
    rules = tuple(Rule(pattern(f"^{re.escape(name)}$"), scheme) for name, scheme in schemes.items())
    most = next((kind for kind, _ in weights.most_common() if kind not in FLOAT_TYPES), str(recipe.scheme))
    return dataclasses.replace(recipe, scheme=parse_scheme(most), rules=rules)
