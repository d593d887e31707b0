"""What methods that scale columns share: a block's moments, each pair scaled in turn, then each matrix packed."""

import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.arrays import Scheme, TransformedArray
from qjax.arrays.affine import AffineArray
from qjax.calibrate.blocks import Block, Line, Weights
from qjax.calibrate.methods.pairs import PAIRS, Pair, fold, foldable, of_rows, ties
from qjax.quantizers.moments import Moments, both, moments, scaled, squared_error

# find(pair, float32 matrices that are to be packed, by their names, ties) -> scale of each column (None for ones), and
# what to say of it.
Find = Callable[[Pair, dict[str, Any], Any], tuple[Float32[Array, " in"] | None, str]]
# pack(float32 matrix, scheme, second moments of its scaled inputs) -> packed.
Pack = Callable[[Any, Scheme, Any], AffineArray]


def _tap(names: tuple[str, ...], x: Float[Array, "batch seq in"]) -> Moments:
    return moments(x)


def block_moments(block: Block) -> dict[tuple[str, ...], Moments]:
    """Of each input of its products, over all calibration tokens through its float weights."""
    total: dict[tuple[str, ...], Moments] = {}
    for x in block.batches(block.inputs):
        _, tapped = block.run(block.weights, x, _tap)
        total = {names: both(total[names], found) if total else found for names, found in tapped.items()}
    return total


def scale_and_pack(
    block: Block, moments: dict[tuple[str, ...], Moments], find: Find, pack: Pack, *, folded: bool
) -> tuple[Weights, list[Line]]:
    """The block's weights, scaled pair by pair and packed, and a line for each packed one.

    Args:
      moments: see `block_moments`.
      folded: divide what comes before by a pair's scale where that can be; else, and where it cannot, the packed
        matrices of the pair keep it as their input scale.
    """
    weights = dict(block.weights)
    lines = []
    # By matrix: what its inputs are over, what of that is its own business, what its rows are over.
    columns, kept, rows, notes, spent = {}, {}, {}, {}, {}
    for pair in PAIRS:
        ours = {name: jnp.asarray(weights[name]).astype(jnp.float32) for name in pair.names if name in block.schemes}
        if not ours:
            continue
        start = time.perf_counter()
        folds = folded and foldable(weights, pair)
        tied = ties(pair, block.config) if folds else None
        scale, note = find(pair, ours, None if tied is None else jnp.asarray(tied))
        if scale is None:
            scale = jnp.ones_like(moments[pair.names].most)
        elif folds:
            weights = fold(weights, pair, scale, block.config)
            rows[pair.before] = of_rows(scale, tied)
        else:
            weights |= {name: w * scale[None] for name, w in ours.items()}
            kept |= dict.fromkeys(ours, scale)
        columns |= dict.fromkeys(ours, scale)
        notes |= dict.fromkeys(ours, note)
        spent |= dict.fromkeys(ours, (time.perf_counter() - start) / len(ours))
    for pair in PAIRS:
        for name in pair.names:
            scheme = block.schemes.get(name)
            if scheme is None:
                weights[name] = _as_was(weights[name], block.weights[name])
                continue
            start = time.perf_counter()
            w = jnp.asarray(weights[name]).astype(jnp.float32)
            second = scaled(moments[pair.names].second, columns[name])
            packed = pack(w, scheme, second)
            back = rows[name][:, None] if name in rows else jnp.float32(1)
            error, true = (packed.dequantize() - w) * back, w * back
            line = Line(
                block.index,
                name,
                str(scheme),
                _ratio(jnp.sum(jnp.square(error)), jnp.sum(jnp.square(true))),
                _ratio(squared_error(error, second), squared_error(true, second)),
                spent[name] + time.perf_counter() - start,
                notes[name],
            )
            lines.append(line)
            rounding = "int8" if scheme.activations == "int8" else None
            if name in kept or rounding is not None:
                packed = TransformedArray(packed, input_scale=kept.get(name), rounding=rounding)
            weights[name] = packed
    return weights, lines


def _ratio(error: Any, true: Any) -> float:
    return float(error) / float(true) if float(true) > 0 else 0.0


def _as_was(weight: Any, before: Any) -> Any:
    """A float matrix in the dtype it came in."""
    return weight.astype(before.dtype) if hasattr(weight, "astype") else weight
