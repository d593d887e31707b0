"""Learned rounding of a small random block: never worse than its start, the same bits each time, the rest untouched."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import AffineArray, Scheme
from qjax.calibrate.blocks import Block, Line, Made, Weights
from qjax.calibrate.methods.awq import AWQ
from qjax.calibrate.methods.gptq import GPTQ
from qjax.calibrate.methods.learned import Learned
from qjax.calibrate.methods.rtn import RTN
from qjax.errors import QjaxError
from qjax.evaluate.shapes import llama
from qjax.models.load import MATRICES, inverse_frequencies

CONFIG = llama(layers=1, hidden=64, heads=4, kv_heads=2, ffn=64, vocab=32, context=32)
HIDDEN, KV, FFN = CONFIG.hidden, CONFIG.kv_heads * CONFIG.head_dim, CONFIG.ffn
SHAPES = dict(
    zip(
        MATRICES,
        [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)],
        strict=True,
    )
)


def block_of(schemes: dict[str, Scheme], samples: int = 12, seed: int = 0) -> Block:
    """Inputs go together, and are a little off those of the float model."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights: Weights = {name: jnp.asarray(draw(*shape) * shape[1] ** -0.5) for name, shape in SHAPES.items()}
    weights |= {name: jnp.ones(HIDDEN, jnp.float32) for name in ("attn_norm", "ffn_norm")}
    true = draw(samples, 16, 12) @ draw(12, HIDDEN) + 0.3 * draw(samples, 16, HIDDEN)
    rope = jnp.asarray(inverse_frequencies(CONFIG, None))
    return Block(0, weights, schemes, CONFIG, rope, true + 0.05 * draw(*true.shape), true, batch=4)


def all_of(scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(MATRICES, scheme)


def distance(block: Block, weights: Weights) -> float:
    """Mean square of the block's output less the float one."""
    return float(
        np.mean(np.square(block.outputs(weights, block.inputs) - block.outputs(block.weights, block.float_inputs)))
    )


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(bool(jnp.array_equal(x, y)) for x, y in pairs)


def test_output_is_nearer_than_the_starts_and_what_is_said_of_it() -> None:
    block = block_of(all_of(Scheme(3, 32, False)))
    found, lines, *_ = Learned(steps=40, batch=4, grid_share=1.0, reach=0.49, start=RTN())(block)
    before, after = distance(block, RTN()(block)[0]), distance(block, found)
    assert after < 0.5 * before
    assert {line.name for line in lines} == set(MATRICES)
    assert lines[0].note == f"block's loss {before:.3g}, then {after:.3g}"
    for line in lines:
        array, w = found[line.name], block.weights[line.name]
        assert isinstance(array, AffineArray)
        assert array.scale.dtype == jnp.float16
        error = float(jnp.sum(jnp.square(array.dequantize() - w)) / jnp.sum(jnp.square(w)))
        assert line.weight_error == pytest.approx(error, rel=1e-4)


def test_a_start_that_is_not_improved_is_the_result() -> None:
    block = block_of(all_of(Scheme(3, 32, False)))
    # Steps that shake everything.
    found, *_ = Learned(steps=2, batch=4, learning_rate=0.5, start=RTN())(block)
    assert same(found, RTN()(block)[0])


def test_no_steps_are_the_start() -> None:
    block = block_of(all_of(Scheme(3, 32, False)))
    assert same(Learned(steps=0, start=RTN())(block)[0], RTN()(block)[0])


def test_the_same_bits_each_time_and_others_of_another_seed() -> None:
    block = block_of(all_of(Scheme(3, 32, False)))
    found = [Learned(steps=20, batch=4, seed=seed, start=RTN())(block)[0] for seed in (0, 0, 1)]
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_other_weights_are_the_same_objects() -> None:
    block = block_of({"attn_v": Scheme(2, 32), "ffn_down": Scheme(4, -1, False)})
    found, lines, *_ = Learned(steps=20, batch=4, start=RTN())(block)
    assert sorted(line.name for line in lines) == ["attn_v", "ffn_down"]
    for name, w in block.weights.items():
        assert (found[name] is w) == (name not in block.schemes)


@pytest.mark.slow
def test_what_a_start_changes_of_the_inputs_stays() -> None:
    """Columns in the order of their importance, scales of the inputs, activations rounded to int8."""
    rounded = Scheme(3, 32, activations="int8")
    starts = {"attn_q": GPTQ(static_groups=False), "attn_output": AWQ(fold=False, clip=False), "ffn_up": RTN()}
    first = {}
    for name, start in starts.items():
        first |= {name: start(block_of({name: rounded}))[0][name]}
    assert first["attn_q"].columns is not None
    assert first["attn_output"].input_scale is not None
    block = block_of(dict.fromkeys(starts, rounded))
    found, *_ = Learned(steps=40, batch=4, start=Ready(first))(block)
    assert distance(block, found) < 0.9 * distance(block, block.weights | first)
    for name, array in first.items():
        assert same(found[name].replace(inner=None), array.replace(inner=None))
        assert found[name].rounding == "int8"
        assert not same(found[name], array)


@dataclasses.dataclass(frozen=True)
class Ready:
    """A start that was made before."""

    arrays: dict[str, Any]
    needs_inputs = needs_float = False

    def __call__(self, block: Block) -> Made:
        return Made(block.weights | self.arrays, [Line(0, name, "", 0.0, None, 0.0) for name in self.arrays])


class Folding:
    """A start that changes a norm."""

    needs_inputs = needs_float = False

    def __call__(self, block: Block) -> Made:
        weights, lines, *_ = RTN()(block)
        return Made(weights | {"ffn_norm": 2 * weights["ffn_norm"]}, lines)


def test_a_start_that_changes_other_weights_is_refused() -> None:
    with pytest.raises(QjaxError, match=r"blk\.0\.ffn_norm\.weight.*start"):
        Learned(steps=1, start=Folding())(block_of(all_of(Scheme(4, 32))))


@pytest.mark.parametrize("options", [{"steps": -1}, {"batch": 0}, {"learning_rate": 0.0}, {"reach": 0.5}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(QjaxError, match="expected"):
        Learned(**options)
