"""GPTQ and round to nearest of a block of the embedded model: what is packed, what is logged, what is lost."""

from typing import Any

import numpy as np
import pytest

import qjax
from qjax.arrays import Scheme
from qjax.calibrate.blocks import Block, begin_blocks
from qjax.calibrate.methods.gptq import GPTQ
from qjax.calibrate.methods.rtn import RTN
from qjax.models.load import MATRICES


@pytest.fixture(scope="module")
def floats() -> Any:
    return qjax.load("embedded", quantize=lambda name, w: w.astype(np.float32))


@pytest.fixture(scope="module")
def second(floats: Any, chunks: np.ndarray) -> Block:
    """The second block, behind a first one of 3 bits."""
    first, weights = floats.params["layers"][:2]
    x = begin_blocks(floats.params["token_embd"], chunks)
    schemes = dict.fromkeys(MATRICES, Scheme(3, 32))
    block = Block(0, first, schemes, floats.config, floats.params["rope"], x, batch=2)
    packed, _ = RTN()(block)
    after, true = block.outputs(packed, x), block.outputs(first, x)
    return Block(1, weights, schemes, floats.config, floats.params["rope"], after, true, batch=2)


def distance(block: Block, weights: Any) -> float:
    """Mean squared difference of the block's output to that of the float model."""
    true = block.outputs(block.weights, block.float_inputs)
    return float(np.square(block.outputs(weights, block.inputs) - true).mean())


def test_each_option_takes_the_output_nearer_to_the_float_models(second: Block) -> None:
    found = [distance(second, method(second)[0]) for method in (RTN(), GPTQ(asymmetric=False), GPTQ())]
    assert found[0] > 1.05 * found[1] > 1.05**2 * found[2]
