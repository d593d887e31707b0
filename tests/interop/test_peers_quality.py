"""Quantizing methods against llm-compressor and AutoRound, run live on the same tokens: divergence to the float model.

`benchmarks/vs_llmcompressor.py` shows the table. Here it is run with three calibration seeds on the first chunks.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import benchmark

pytestmark = pytest.mark.interop

SEEDS, CHUNKS = [0, 1, 2], 32

vs = benchmark("vs_llmcompressor")
MATCHES = {match.name: match for match in vs.matches([40])}


@pytest.fixture(scope="module")
def measured(peer: Callable[..., str], interop: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`measured(match)`: its result; what has been measured once is not again."""
    texts = {"data": interop / "calibration.txt", "text": interop / "heldout.txt"}
    args = argparse.Namespace(
        model=interop / "hf-float",
        peers=os.environ["QJAX_PEERS"],
        folder=Path(os.environ.get("QJAX_PEERS_MADE", tmp_path_factory.mktemp("peers"))),
        samples=128,
        seq_len=256,
        seeds=SEEDS,
        chunks=CHUNKS,
        **{name: str(path) for name, path in texts.items()},
    )
    bench, klds = vs.Bench(args), {}

    def result(match: Any) -> Any:
        missing = [made for made in match if made not in klds]
        klds.update(bench.measure(missing) if missing else {})
        return vs.result(match, klds)

    return result


@pytest.mark.parametrize("name", MATCHES)
def test_no_further_from_the_float_model(measured: Callable[..., Any], name: str) -> None:
    found = measured(MATCHES[name])
    print(vs.report([found]))
    assert np.mean(found.a) <= np.mean(found.b)
