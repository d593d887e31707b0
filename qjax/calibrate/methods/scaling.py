"""What methods that scale columns share: sums over a block's inputs, its pairs scaled in turn, its matrices packed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.arrays import TransformedArray
from qjax.arrays.affine import AffineArray
from qjax.calibrate.blocks import Block, Line, Made, Weights
from qjax.calibrate.methods.packed import lost, with_activations
from qjax.calibrate.methods.pairs import PAIRS, Pair, fold, foldable, of_rows, ties
from qjax.quantizers.input_sums import InputSums, both, input_sums, scaled

# find(pair, float32 matrices that are to be packed, by their names, ties) -> scale of each column (None for ones), and
# what to say of it.
Find = Callable[[Pair, dict[str, Any], Any], tuple[Float32[Array, " in"] | None, str]]
# pack(name, its scaled float32 matrix, second moments of its scaled inputs) -> packed.
Pack = Callable[[str, Any, Any], AffineArray]


def _tap(names: tuple[str, ...], x: Float[Array, "batch seq in"]) -> InputSums:
    return input_sums(x)


def block_sums(block: Block) -> dict[tuple[str, ...], InputSums]:
    """Of each input of its products, over all calibration tokens through its float weights."""
    total: dict[tuple[str, ...], InputSums] = {}
    for x in block.batches(block.inputs):
        _, tapped = block.run(block.weights, x, _tap)
        total = {names: both(total[names], found) if total else found for names, found in tapped.items()}
    return total


def sample(block: Block) -> Float32[Array, "batch seq hidden"]:
    """One batch of its inputs, drawn evenly from all."""
    step = max(len(block.inputs) // block.batch, 1)
    return jnp.asarray(block.inputs[::step][: block.batch])


class Scaled(NamedTuple):
    """A block's float weights with scaled columns; the rest by the names of the matrices that are to be packed.

    columns: what the inputs are over. kept: those that the packed matrix divides by itself. rows: what its rows are
    over. notes, seconds: how the scale was found.
    """

    weights: Weights
    columns: dict[str, Any]
    kept: dict[str, Any]
    rows: dict[str, Any]
    notes: dict[str, str]
    seconds: dict[str, float]


def scale(block: Block, sums: dict[tuple[str, ...], InputSums], find: Find, *, folded: bool) -> Scaled:
    """The scales of each pair, one after the other.

    Args:
      sums: see `block_sums`.
      folded: divide what comes before by a pair's scale where that can be; else, and where it cannot, the packed
        matrices of the pair keep it as their input scale.
    """
    weights = dict(block.weights)
    columns, kept, rows, notes, seconds = {}, {}, {}, {}, {}
    for pair in PAIRS:
        ours = {name: jnp.asarray(weights[name]).astype(jnp.float32) for name in pair.names if name in block.schemes}
        if not ours:
            continue
        start = time.perf_counter()
        folds = folded and foldable(weights, pair)
        tied = ties(pair, block.config) if folds else None
        s, note = find(pair, ours, None if tied is None else jnp.asarray(tied))
        if s is None:
            s = jnp.ones_like(sums[pair.names].most)
        elif folds:
            weights = fold(weights, pair, s, block.config)
            rows[pair.before] = of_rows(s, tied)
        else:
            weights |= {name: w * s[None] for name, w in ours.items()}
            kept |= dict.fromkeys(ours, s)
        columns |= dict.fromkeys(ours, s)
        notes |= dict.fromkeys(ours, note)
        seconds |= dict.fromkeys(ours, (time.perf_counter() - start) / len(ours))
    return Scaled(weights, columns, kept, rows, notes, seconds)


def pack_scaled(block: Block, sums: dict[tuple[str, ...], InputSums], found: Scaled, pack: Pack) -> Made:
    """The block with packed matrices."""
    weights, lines = dict(found.weights), []
    for pair in PAIRS:
        for name in pair.names:
            scheme = block.schemes.get(name)
            if scheme is None:
                weights[name] = _as_was(weights[name], block.weights[name])
                continue
            start = time.perf_counter()
            w = jnp.asarray(weights[name]).astype(jnp.float32)
            second = scaled(sums[pair.names].second, found.columns[name])
            packed = pack(name, w, second)
            # What the next matrix makes of its rows counts.
            rows = found.rows.get(name)
            errors = float(lost(packed, w, rows=rows)), float(lost(packed, w, second, rows=rows))
            took = found.seconds[name] + time.perf_counter() - start
            lines.append(Line(block.index, name, str(scheme), *errors, took, found.notes[name]))
            if name in found.kept:
                packed = TransformedArray(packed, input_scale=found.kept[name])
            weights[name] = with_activations(packed, scheme)
    return Made(weights, lines)


def _as_was(weight: Any, before: Any) -> Any:
    """A float matrix in the dtype it came in."""
    return weight.astype(before.dtype) if hasattr(weight, "astype") else weight
