"""Quantizing methods against rounding to nearest, on a real model: divergence to the float model on held-out text.

`benchmarks/methods.py` shows the table. Here it is run on the first chunks.
"""

from pathlib import Path

import pytest
from loading import benchmark

import qjax
from qjax.arrays import parse_scheme
from qjax.text.files import read_text

pytestmark = pytest.mark.interop

SAMPLES, LENGTH, CHUNKS = 128, 256, 32

methods = benchmark("methods")


@pytest.mark.parametrize(("method", "scheme", "at_most"), [("awq", "w4g128-asym", 0.9), ("gptq", "w3g128", 0.3)])
def test_nearer_to_the_float_model_than_to_nearest(interop: Path, method: str, scheme: str, at_most: float) -> None:
    model = qjax.load(interop / "hf-float")
    tokens = methods.calibration(model, read_text(interop / "calibration.txt"), SAMPLES, LENGTH, None)
    text = read_text(interop / "heldout.txt")
    found, *_ = methods.measured(model, ["rtn", method], parse_scheme(scheme), tokens, text, CHUNKS)
    of = {row.name: row.found.mean_kld for row in found.rows}
    (pair,) = found.pairs
    print(scheme, of, pair)
    assert (pair.a, pair.b) == (method, "rtn")
    # All of the paired difference's 95 % interval.
    assert pair.high < 0
    assert of[method] < at_most * of["rtn"]
