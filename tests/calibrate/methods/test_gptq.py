"""GPTQ and round to nearest of a small block: what is packed, what is logged, what is lost."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import Scheme, TransformedArray
from qjax.arrays.affine import AffineArray
from qjax.calibrate.blocks import Block, Method
from qjax.calibrate.methods.gptq import GPTQ
from qjax.calibrate.methods.rtn import RTN
from qjax.errors import QjaxError
from qjax.evaluate.shapes import llama
from qjax.models.load import MATRICES

HIDDEN = 32
CONFIG = llama(layers=2, hidden=HIDDEN, heads=4, kv_heads=2, ffn=32, vocab=16, context=64)
SHAPES = {
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (32, 32),
    "ffn_up": (32, 32),
    "ffn_down": (32, 32),
}


@pytest.fixture(scope="module")
def block() -> Block:
    """Random weights; inputs that go together, and that lack something of those of the float model."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights: dict[str, Any] = {name: jnp.asarray(2 * draw(*s) / np.sqrt(s[1])) for name, s in SHAPES.items()}
    weights |= {name: jnp.ones(HIDDEN, jnp.float32) for name in ("attn_norm", "ffn_norm")}
    true = draw(16, 64, 4) @ draw(4, HIDDEN) + 0.5 * draw(16, 64, HIDDEN)
    return Block(
        1,
        weights,
        dict.fromkeys(MATRICES, Scheme(3, 16)),
        CONFIG,
        jnp.asarray(1e4 ** (-np.arange(4) / 4), jnp.float32),
        true + 0.1 * draw(*true.shape),
        true,
    )


def distance(block: Block, method: Method) -> float:
    """Mean squared difference of the block's output to that of the float model."""
    assert block.float_inputs is not None
    true = block.outputs(block.weights, block.float_inputs)
    return float(np.square(block.outputs(method(block)[0], block.inputs) - true).mean())


def test_each_step_takes_the_output_nearer_to_the_float_models(block: Block) -> None:
    found = [distance(block, method) for method in (RTN(), GPTQ(asymmetric=False), GPTQ())]
    assert all(better < 0.95 * worse for worse, better in itertools.pairwise(found))


def test_lines_say_what_was_lost(block: Block) -> None:
    (_, nearest, *_), (weights, lines, *_) = RTN()(block), GPTQ(asymmetric=False)(block)
    assert [line.name for line in lines] == list(MATRICES)
    for line, of_nearest in zip(lines, nearest, strict=True):
        w = np.asarray(block.weights[line.name])
        error = np.square(np.asarray(weights[line.name].dequantize()) - w).sum() / np.square(w).sum()
        assert line.weight_error == pytest.approx(error, rel=1e-3)
        assert line.output_error is not None
        assert of_nearest.weight_error < line.weight_error < 0.5
        assert line.output_error < of_nearest.weight_error
        assert (line.block, line.scheme, line.note) == (1, "w3g16", "")
        assert of_nearest.output_error is None
        assert line.seconds > 0


def test_matrices_come_back_as_their_schemes_say(block: Block) -> None:
    schemes = {
        "attn_q": Scheme(8, 0),
        "attn_k": Scheme(8, 0),
        "attn_v": Scheme(8, -1, activations="int8"),
        "ffn_up": Scheme(4, 16, symmetric=False),
    }
    weights, lines, *_ = GPTQ(static_groups=False, mse=False)(dataclasses.replace(block, schemes=schemes))
    assert [line.name for line in lines] == list(schemes)
    assert all(weights[name] is block.weights[name] for name in block.weights if name not in schemes)
    q, k, v, up = (weights[name] for name in schemes)
    assert all(isinstance(array, AffineArray) and len(np.unique(array.scale)) == 1 for array in (q, k))
    assert q.scale[0, 0] != k.scale[0, 0]
    assert isinstance(v, TransformedArray)
    assert v.rounding == "int8"
    assert v.columns is None
    assert isinstance(up, TransformedArray)
    assert sorted(np.asarray(up.columns)) == list(range(32))
    assert up.inner.zero.shape == (32, 2)
    assert all(weights[name].shape == SHAPES[name] for name in schemes)


def test_later_inputs_go_through_the_quantized_matrices(block: Block) -> None:
    codes = lambda method: {
        name: np.asarray(array.planes[0]) for name, array in method(block)[0].items() if name in SHAPES
    }
    sequential, again, at_once = (codes(GPTQ(true_sequential=on)) for on in (True, True, False))
    for name in SHAPES:
        np.testing.assert_array_equal(sequential[name], again[name])
        first = name in ("attn_q", "attn_k", "attn_v")
        assert first == np.array_equal(sequential[name], at_once[name])


@pytest.mark.parametrize("kept", [(), ("attn_output",), ("ffn_gate", "ffn_up", "ffn_down")], ids=str)
def test_what_it_has_seen_come_out_is_the_blocks_output(block: Block, kept: tuple[str, ...]) -> None:
    """Bit for bit: a run that goes on later computes it anew."""
    given = dataclasses.replace(block, schemes={n: s for n, s in block.schemes.items() if n not in kept}, batch=5)
    made = GPTQ()(given)
    assert given.float_inputs is not None
    np.testing.assert_array_equal(made.outputs, given.outputs(made.weights, given.inputs))
    np.testing.assert_array_equal(made.float_outputs, given.outputs(given.weights, given.float_inputs))
    np.testing.assert_array_equal(given.inputs, block.inputs)
    for other in (GPTQ(true_sequential=False)(given), GPTQ()(dataclasses.replace(given, last=True))):
        assert other.outputs is None
        np.testing.assert_array_equal(other.float_outputs, made.float_outputs)


def test_both_halves_are_the_layer(block: Block) -> None:
    whole = np.concatenate([np.asarray(block.run(block.weights, x)[0]) for x in block.batches(block.inputs)])
    np.testing.assert_allclose(block.outputs(block.weights, block.inputs), whole, rtol=1e-5, atol=1e-5)


def test_damping_that_grew_is_said(block: Block) -> None:
    """Inputs of one direction only, no damping: no Cholesky decomposition."""
    one = np.ones_like(block.inputs) * np.arange(1, HIDDEN + 1, dtype=np.float32)
    _, lines, *_ = GPTQ(damp=0.0, asymmetric=False)(
        dataclasses.replace(block, inputs=one, schemes={"attn_q": Scheme(4, 16)})
    )
    assert "the Hessian was not positive definite" in lines[0].note


def test_inputs_that_are_not_finite_are_refused(block: Block) -> None:
    damaged = block.inputs.copy()
    damaged[3, 5, 7] = np.nan
    with pytest.raises(QjaxError, match=r"blk\.1\.attn_q\.weight: .* not finite"):
        GPTQ()(dataclasses.replace(block, inputs=damaged))


@pytest.mark.parametrize("options", [{"block_size": 0}, {"damp": -0.1}, {"damp": float("nan")}])
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(QjaxError, match="expected a block size"):
        GPTQ(**options)
