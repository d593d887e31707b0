"""`qjax calibrate` against llama-imatrix's file: the same counts, sums to 1e-3."""

from pathlib import Path

import numpy as np
import pytest

from qjax.formats.gguf.imatrix import read_imatrix
from qjax.runs.calibrate import calibrate

pytestmark = pytest.mark.interop


def test_equals_llama_imatrix(interop: Path, tmp_path: Path) -> None:
    """It had float16 weights, for which llama.cpp rounds activations to float16: the larger part of the difference."""
    calibrate(str(interop / "tiny-f16.gguf"), interop / "calibration.txt", tmp_path / "imatrix.gguf")
    ours, theirs = read_imatrix(tmp_path / "imatrix.gguf"), read_imatrix(interop / "imatrix.gguf")
    assert (ours.chunks, ours.chunk_size) == (theirs.chunks, theirs.chunk_size)
    assert ours.sums.keys() == theirs.sums.keys()
    for name, sums in theirs.sums.items():
        assert ours.counts[name] == theirs.counts[name]
        np.testing.assert_allclose(ours.sums[name], sums, rtol=1e-3, err_msg=name)
