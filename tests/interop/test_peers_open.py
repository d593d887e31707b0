"""Folders that qjax saved, opened by the peers: transformers with compressed-tensors, and AutoRound's kernels.

And what qjax reads of the peers' folders, weight by weight, against a decoder that shares no code with it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.arrays import QuantizedArray
from qjax.calibrate.data import Calibration
from qjax.models import forward, init_cache
from qjax.models.load import MATRICES

pytestmark = pytest.mark.interop

Peer = Callable[..., str]
# Of the largest logit: float32 sums in another order; AutoRound's kernels, which round weights to float16; the one for
# 2 bits of auto-round-lib, which rounds inputs to int8.
EXACT, HALF, ROUNDED = 1e-5, 1e-3, 2e-2


class Saved(NamedTuple):
    format: str
    recipe: Callable[[], Any]
    tolerance: float = EXACT

    @property
    def calibrated(self) -> bool:
        return self.recipe().method.needs_inputs


rtn = lambda *args, **options: functools.partial(qjax.RTN, *args, **options)
ACT_ORDER = functools.partial(qjax.GPTQ, 4, 64, static_groups=False)
SAVED = {
    "gptq-w4g128": Saved("gptq", rtn(4, 128), HALF),
    "gptq-w4g32-asym": Saved("gptq", rtn(4, 32, symmetric=False), HALF),
    "gptq-w2g64": Saved("gptq", rtn(2, 64), ROUNDED),
    "gptq-w3g128": Saved("gptq", rtn(3, 128), HALF),
    "gptq-w8": Saved("gptq", rtn(8, -1), HALF),
    "gptq-w8g128-asym": Saved("gptq", rtn(8, 128, symmetric=False), HALF),
    "gptq-act-order": Saved("gptq", ACT_ORDER),
    "awq-w4g128-asym": Saved("awq", rtn(4, 128, symmetric=False)),
    "awq-w4g32": Saved("awq", rtn(4, 32)),
    "ct-w4g128": Saved("compressed-tensors", rtn(4, 128)),
    "ct-w4g32-asym": Saved("compressed-tensors", rtn(4, 32, symmetric=False)),
    "ct-w3g128": Saved("compressed-tensors", rtn(3, 128)),
    "ct-w2g64-asym": Saved("compressed-tensors", rtn(2, 64, symmetric=False)),
    "ct-w8": Saved("compressed-tensors", rtn(8, -1)),
    # With groups in the order of columns; others are not in what compressed-tensors reads.
    "ct-act-order": Saved("compressed-tensors", functools.partial(qjax.GPTQ, 4, 64)),
}
WEIGHTS_ONLY = ["hf-awq-w4g128", "hf-awq-w4g32-sym", "hf-ct-gptq-w4g128", "hf-ct-gptq-w4g128-asym"]
WEIGHTS_ONLY += ["hf-ct-int8-w8a16", "hf-gptq-w2g32-asym", "hf-gptq-w3g128", "hf-gptq-w4g128", "hf-gptq-w4g128-asym"]
WEIGHTS_ONLY += ["hf-gptq-w8g32"]


@pytest.fixture(scope="module")
def ids(interop: Path) -> np.ndarray:
    """int32 [2, 64], of the held-out text."""
    model = qjax.load(interop / "hf-float")
    found = model.encode((interop / "heldout.txt").read_text(encoding="utf-8")[:4000])
    return np.asarray(found[:128], np.int32).reshape(2, 64)


@pytest.fixture(scope="module")
def saved(interop: Path, ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders, one of each kind."""
    root = tmp_path_factory.mktemp("saved")
    for name, kind in SAVED.items():
        given = {"calibration": Calibration(ids, len(ids))} if kind.calibrated else {}
        made = qjax.load(interop / "hf-float", quantize=kind.recipe(), **given)
        qjax.save(made, root / name, format=kind.format)
    return root


@pytest.fixture(scope="module")
def theirs(peer: Peer, saved: Path, ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The peers' logits of each folder that they open."""
    folder = tmp_path_factory.mktemp("logits")
    np.save(folder / "ids.npy", ids)
    print(peer("logits.py", folder / "ids.npy", folder / "logits.npz", *(saved / name for name in SAVED)))
    with np.load(folder / "logits.npz", allow_pickle=False) as found:
        return dict(found)


@pytest.mark.parametrize("name", SAVED)
def test_saved_folders_open_with_equal_logits(
    saved: Path, theirs: dict[str, np.ndarray], ids: np.ndarray, name: str
) -> None:
    if name not in theirs:
        pytest.skip("the peers have no kernel for this on a CPU (auto-round-lib has some)")
    model = qjax.load(saved / name)
    held = model.params["layers"][0]["ffn_down"]
    assert isinstance(held, QuantizedArray)
    run = jax.jit(forward, static_argnums=1)
    cache = init_cache(model.config, *ids.shape, jnp.float32)
    ours = np.asarray(run(model.params, model.config, jnp.asarray(ids), cache)[0])
    worst = np.abs(ours - theirs[name]).max() / np.abs(theirs[name]).max()
    print(f"{name}: {worst:.1e} of the largest logit")
    assert worst <= SAVED[name].tolerance


@pytest.fixture(scope="module")
def decoded(peer: Peer, interop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoded")
    peer("decode.py", root, *(interop / name for name in WEIGHTS_ONLY))
    return root


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_of_the_peers_are_those_of_a_decoder_apart(interop: Path, decoded: Path, name: str) -> None:
    packed, floats = qjax.load(interop / name), qjax.load(decoded / name)
    for ours, plain in zip(packed.params["layers"], floats.params["layers"], strict=True):
        for matrix in MATRICES:
            assert isinstance(ours[matrix], QuantizedArray)
            np.testing.assert_array_equal(np.asarray(ours[matrix].dequantize()), np.asarray(plain[matrix]), matrix)
