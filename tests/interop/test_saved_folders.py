"""Folders that qjax saved, opened by the peers: the same logits (QJAX_PEERS: a Python with torch and the peers)."""

import os
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.arrays import TransformedArray, parse_scheme
from qjax.quantizers.rtn import rtn

SCRIPT = Path(__file__).with_name("peers_open.py")
# AutoRound computes GPTQ in float16, and gives W8A8's activations other roundings at ties.
CASES = {
    "gptq": [("w4g128", 0.02), ("w2g32-asym", 0.02), ("w3g64", 0.02), ("w8g32", 0.02), ("w4", 0.02)],
    "awq": [("w4g128-asym", 1e-3), ("w4g32", 1e-3)],
    "compressed-tensors": [("w4g128", 1e-3), ("w4g32-asym", 1e-3), ("w3g128-asym", 1e-3), ("w8", 1e-3), ("w8a8", 0.1)],
}


def quantized(folder: Path, text: str) -> qjax.Model:
    scheme = parse_scheme(text)

    def make(name: str, w: Any) -> Any:
        if not name.startswith("blk."):
            return jnp.asarray(w, jnp.float16)
        array = rtn(jnp.asarray(w), scheme)
        if array.zero is not None:
            # Of which GPTQ's version 1 has none.
            array = array.replace(zero=jnp.maximum(array.zero, jnp.uint8(1)))  # pyright: ignore[reportAttributeAccessIssue]
        return TransformedArray(array, rounding="int8") if scheme.activations == "int8" else array

    return qjax.load(folder, quantize=make)


@pytest.mark.interop
@pytest.mark.parametrize("format_name", CASES)
def test_the_peers_open_them_and_compute_the_same(interop: Path, tmp_path: Path, format_name: str) -> None:
    python = os.environ.get("QJAX_PEERS")
    if python is None or not Path(python).exists():
        pytest.skip("no Python of the peers (set QJAX_PEERS)")
    ids = np.load(interop / "hf-float-logits.npz")["ids"].reshape(-1)[:64].astype(np.int64)
    np.save(tmp_path / "ids.npy", ids)
    ours = {}
    for text, _ in CASES[format_name]:
        model = quantized(interop / "hf-float", text)
        qjax.save(model, tmp_path / text, format_name)
        ours[text] = np.asarray(qjax.forward(model.params, model.config, jnp.asarray(ids, jnp.int32)[None])[0][0])
    command = [python, SCRIPT, tmp_path / "ids.npy", tmp_path / "out.npz", *(tmp_path / text for text in ours)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "out.npz")
    for text, tolerance in CASES[format_name]:
        np.testing.assert_allclose(theirs[text], ours[text], atol=tolerance, rtol=tolerance, err_msg=text)
