"""Learned rounding and grids of a block: its output is brought near the float block's, by gradients."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.arrays import Scheme, TransformedArray
from qjax.arrays.transformed import on_inner
from qjax.calibrate.blocks import Block, Hidden, Made, Method, Weights, run_block
from qjax.calibrate.methods.gptq import GPTQ
from qjax.calibrate.methods.packed import lost
from qjax.calibrate.methods.scaling import block_sums
from qjax.errors import QjaxError
from qjax.models import ModelConfig
from qjax.quantizers.learned import Anchor, Offsets, anchored, descended, fake_quantized, packed

# Of each matrix that is learned, by its name.
Schemes = tuple[tuple[str, Scheme], ...]
Learnt = dict[str, Offsets]


@dataclasses.dataclass(frozen=True)
class Learned:
    """Rounding and grids by signed gradient descent (Cheng et al. 2023; see `qjax.quantizers.learned`).

    The loss is the mean square of the quantized block's output less the float block's: the first of what comes out of
    the quantized blocks before, the second of what comes out of the float ones, so that what earlier blocks lost is
    made up for.

    steps: of descent, each on `batch` samples; all come once, in an order drawn by `seed`, before any comes again.
    learning_rate: of the first step, in steps of the grid; it falls to 0 in a line. None for 1 / steps.
    grid_share: steps of scales and zero points, in those of the rounding.
    reach: see `quantizers.learned.anchored`.
    start: what is improved, a method that leaves alone the weights that it does not pack. Where the loss over all
      samples has not become smaller, the start is the result.

    `grid_share` and `reach` are for a start as good as GPTQ's; from RTN's, 1 and 0.49 (the paper's) go further.
    """

    steps: int = 200
    batch: int = 8
    learning_rate: float | None = None
    seed: int = 0
    grid_share: float = 0.1
    reach: float = 0.3
    start: Method = dataclasses.field(default_factory=GPTQ)
    needs_inputs = True
    needs_float = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            raise QjaxError(f"expected steps >= 0 of batches >= 1, got {self.steps} of {self.batch}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise QjaxError(f"expected a learning rate above 0, got {self.learning_rate}")
        if not (self.grid_share >= 0 and 0 <= self.reach < 0.5):
            raise QjaxError(f"expected grid_share >= 0, 0 <= reach < 0.5, got {self.grid_share} and {self.reach}")

    def __call__(self, block: Block) -> Made:
        made = self.start(block)
        if not self.steps or not block.schemes:
            return made
        start, lines, _, target = made
        began = time.perf_counter()
        schemes = tuple(sorted(block.schemes.items()))
        given, offsets = _begin(block, start, schemes, self.reach)
        if target is None:
            target = block.outputs(block.weights, block.inputs if block.float_inputs is None else block.float_inputs)
        mean_loss = partial(_mean_loss, given=given, block=block, target=target, schemes=schemes)
        before = mean_loss(offsets)
        rate = optax.linear_schedule(
            1 / self.steps if self.learning_rate is None else self.learning_rate, 0, self.steps
        )
        for i, at in enumerate(_draws(len(target), self.batch, self.steps, (self.seed, block.index))):
            x, y = block.inputs[at], target[at]
            offsets = _step(offsets, given, x, y, rate(i), self.grid_share, config=block.config, schemes=schemes)
        after = mean_loss(offsets)
        found = start
        if after < before:
            arrays = {name: packed(offsets[name], given.anchors[name], scheme) for name, scheme in schemes}
            found = start | {name: on_inner(start[name], lambda _, a=array: a) for name, array in arrays.items()}
        seconds = (time.perf_counter() - began) / len(schemes)
        note = f"block's loss {before:.3g}, then {min(before, after):.3g}"
        errors = _errors(block, found)
        lines = [line._replace(**errors[line.name], seconds=line.seconds + seconds, note=note) for line in lines]
        return Made(found, lines, float_outputs=None if block.float_inputs is None else target)


def _errors(block: Block, found: Weights) -> dict[str, dict[str, float]]:
    """`Line`'s errors of each packed matrix; its inputs are those of the float block."""
    result = {}
    for names, moments in block_sums(block).items():
        for name in set(names) & set(block.schemes):
            true = jnp.asarray(block.weights[name])
            errors = lost(found[name], true), lost(found[name], true, moments.second)
            result[name] = dict(zip(("weight_error", "output_error"), map(float, errors), strict=True))
    return result


class _Given(NamedTuple):
    """What stays from step to step: anchors by name, the block's weights as the start left them, rope."""

    anchors: dict[str, Anchor]
    weights: Weights
    rope: Any


def _begin(block: Block, start: Weights, schemes: Schemes, reach: float) -> tuple[_Given, Learnt]:
    for name, w in block.weights.items():
        if name not in block.schemes and not (w is start[name] or np.array_equal(w, start[name])):
            raise QjaxError(f"{block.name_of(name)}: learned rounding needs a start that changes packed weights only")
    found = {}
    for name, scheme in schemes:
        array, w = start[name], jnp.asarray(block.weights[name]).astype(jnp.float32)
        if isinstance(array, TransformedArray):
            w, array = _as_inner(w, array), array.inner
        found[name] = anchored(w, array, scheme, reach)
    anchors = {name: anchor for name, (anchor, _) in found.items()}
    return _Given(anchors, start, block.rope), {name: offsets for name, (_, offsets) in found.items()}


def _as_inner(w: Any, array: TransformedArray) -> Any:
    """The float weights that the inner array stands for."""
    w = w if array.input_scale is None else w * array.input_scale[None]
    return w if array.columns is None else jnp.take(w, array.columns, axis=1)


def _draws(samples: int, batch: int, steps: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Which samples each step looks at."""
    batch, rng = min(batch, samples), np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(samples)
        yield order[:batch]
        order = order[batch:]


def _loss(offsets: Learnt, given: _Given, x: Any, y: Any, config: ModelConfig, schemes: Schemes) -> Any:
    weights = dict(given.weights)
    for name, scheme in schemes:
        w = fake_quantized(offsets[name], given.anchors[name], scheme)
        weights[name] = on_inner(weights[name], lambda _, w=w: w)
    return jnp.mean(jnp.square(run_block(weights, x, given.rope, config)[0] - y))


_batch_loss = jax.jit(_loss, static_argnames=("config", "schemes"))


def _mean_loss(offsets: Learnt, given: _Given, block: Block, target: Hidden, schemes: Schemes) -> float:
    """Over all samples."""
    pairs = zip(block.batches(block.inputs), block.batches(target), strict=True)
    losses = [len(x) * _batch_loss(offsets, given, x, y, block.config, schemes) for x, y in pairs]
    return float(np.sum(jax.device_get(losses), dtype=np.float64)) / len(target)


@partial(jax.jit, static_argnames=("config", "schemes"), donate_argnames="offsets")
def _step(
    offsets: Learnt, given: _Given, x: Any, y: Any, rate: Any, grid_share: Any, *, config: ModelConfig, schemes: Schemes
) -> Learnt:
    slopes = jax.grad(_loss)(offsets, given, x, y, config, schemes)
    return {name: descended(each, slopes[name], rate, grid_share) for name, each in offsets.items()}
