"""The numbers of llama-imatrix --show-statistics, for the file beside this one."""

from pathlib import Path

import numpy as np
import pytest

from qjax.calibrate.statistics import statistics
from qjax.formats.gguf.imatrix import Importances, read_imatrix

# Sum, min, max, active %, entropy % (E norm), ZD %, CosSim as it printed them.
SHOWN = {
    "blk.0.attn_k.weight": (96.01, 0.0472, 0.8995, 100, 98.35, 14.84, 0),
    "blk.1.attn_output.weight": (1281.52, 0.6891, 16.9049, 100, 95.89, 15.62, 0.7145),
    "blk.2.ffn_up.weight": (224.49, 0.2347, 10.2767, 100, 96.81, 6.25, 0.9177),
    "blk.3.ffn_down.weight": (14146.38, 0.0076, 715.7221, 100, 85.71, 7.16, 0.1555),
}


def test_are_those_of_llama_imatrix() -> None:
    lines = {
        name: line for line in statistics(read_imatrix(Path(__file__).with_name("imatrix.gguf"))) for name in line.names
    }
    assert len(lines) == 28
    for name, want in SHOWN.items():
        line = lines[name]
        ours = (line.total, line.least, line.most, 100 * line.active, 100 * line.entropy, 100 * line.outlying)
        # To the digits that are shown.
        np.testing.assert_allclose((*ours, line.similarity or 0.0), want, atol=6e-3, rtol=1e-6)


def test_weights_with_one_input_share_a_line_in_the_order_of_layers() -> None:
    a, b = np.array([1.0, 0.0, 3.0, 0.0]), np.array([0.0, 0.0])
    sums = {"output.weight": a, "blk.10.x.weight": a, "blk.9.y.weight": a, "blk.9.x.weight": a, "blk.8.x.weight": b}
    lines = statistics(Importances(sums, dict.fromkeys(sums, np.array(2.0)), 1, 2, ()))
    assert [line.names for line in lines] == [
        ("blk.8.x.weight",),
        ("blk.9.y.weight", "blk.9.x.weight"),
        ("blk.10.x.weight",),
        ("output.weight",),
    ]
    silent, one = lines[0], lines[2]
    assert silent[1:] == (0, 0, 0, 0, 0, 0, 0, 0, None)
    assert (one.total, one.active, one.similarity) == (2, 0.5, pytest.approx(1))
    assert one.entropy == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)) / 2)
