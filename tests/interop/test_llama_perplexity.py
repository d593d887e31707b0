"""llama-perplexity on files that qjax made: it opens them, and gives the same perplexity and divergence."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.evaluate.divergence import divergence, read_base, save_base
from qjax.evaluate.perplexity import chunks_of
from qjax.formats.gguf.plan import Wish
from qjax.quantizers.ggml import TYPES as ENCODED
from qjax.runs.quantize import quantize_file

pytestmark = pytest.mark.interop

CTX, CHUNKS = 512, 24
NUMBER = r"\s*([-\d.]+)(?: ±\s*([\d.]+))?"
Program = Callable[..., str]


@pytest.fixture(scope="module")
def program(interop: Path) -> Program:
    """`program(last, model, ...)`: what llama-perplexity says of a model and the held-out text, down to `last`."""
    path = os.environ.get("LLAMA_PERPLEXITY") or shutil.which("llama-perplexity")
    if path is None:
        pytest.skip("no llama-perplexity on PATH (set LLAMA_PERPLEXITY)")

    def run(last: str, model: Path, *options: Any) -> str:
        command = [path, "-m", model, "-f", interop / "heldout.txt", "-c", CTX, *options]
        # At its end it may lose what its log's thread has not written yet: on a busy machine more often than not.
        for _ in range(10):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, done.stderr[-2000:]
            if last in done.stdout + done.stderr:
                break
        return done.stdout + done.stderr

    return run


def measured(model: Any, interop: Path) -> tuple[np.ndarray, int | None]:
    """Chunks of the held-out text, and what each begins with."""
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    ids = model.encode((interop / "heldout.txt").read_text(encoding="utf-8"))
    return chunks_of(model.config, ids, n_ctx=CTX, bos_id=bos, chunks=CHUNKS), bos


@pytest.mark.parametrize("kind", ["q4_k_m", "q2_k", "q6_k", "iq4_xs"])
def test_perplexity_of_a_file_that_qjax_made(program: Program, interop: Path, tmp_path: Path, kind: str) -> None:
    if kind == "iq4_xs" and "IQ4_XS" not in ENCODED:
        pytest.skip("no encoder of IQ4_XS")
    path = tmp_path / f"{kind}.gguf"
    quantize_file(interop / "tiny-f16.gguf", path, Wish(kind))
    said = program("Final estimate", path, "--chunks", CHUNKS)
    theirs = float(re.search(r"Final estimate: PPL = ([\d.]+)", said)[1])  # pyright: ignore[reportOptionalSubscript]
    model = qjax.load(path)
    chunks, bos = measured(model, interop)
    ours = qjax.perplexity(model.params, model.config, chunks.ravel(), n_ctx=CTX, bos_id=bos).perplexity
    print(f"{kind}: {ours:.4f}, llama.cpp {theirs:.4f}, {100 * (ours / theirs - 1):+.3f} %")
    # llama.cpp rounds activations to int8.
    assert ours == pytest.approx(theirs, rel=0.01)


def test_divergence_to_a_base_that_qjax_saved(program: Program, interop: Path, tmp_path: Path) -> None:
    """Of float weights, for which llama.cpp rounds no activation: both give the same figures."""
    base = qjax.load(interop / "tiny-q3_K_S.gguf")
    chunks, bos = measured(base, interop)
    path = tmp_path / "base.kld"
    save_base(path, base.params, base.config, chunks, bos_id=bos)
    said = program("Same top p:", interop / "tiny-f16.gguf", "--kl-divergence", "--kl-divergence-base", path)

    def theirs(name: str, unit: float = 1.0) -> tuple[float, float]:
        found = re.search(re.escape(name) + r"\s*:" + NUMBER, said)
        assert found is not None, f"{name} is not in {said[-3000:]}"
        return unit * float(found[1]), unit * float(found[2] or 0)

    model = qjax.load(interop / "tiny-f16.gguf")
    ours = divergence(model.params, model.config, read_base(path, model.config), bos_id=bos)
    assert ours.perplexity[:2] == pytest.approx(theirs("Mean PPL(Q)"), rel=1e-3)
    assert ours.base_perplexity == pytest.approx(theirs("Mean PPL(base)")[0], rel=1e-6)
    assert (ours.perplexity_ratio, ours.ratio_stderr) == pytest.approx(theirs("Mean PPL(Q)/PPL(base)"), rel=5e-3)
    assert (ours.mean_kld, ours.kld_stderr) == pytest.approx(theirs("Mean    KLD"), rel=5e-3, abs=1e-6)
    assert ours.median_kld == pytest.approx(theirs("Median  KLD")[0], rel=5e-3)
    assert ours.max_kld == pytest.approx(theirs("Maximum KLD")[0], rel=0.01)
    for share in ("10.0", "90.0", "99.0", "99.9"):
        assert ours.percentiles[f"{float(share):g}"] == pytest.approx(theirs(f"{share}%   KLD")[0], rel=0.01, abs=1e-6)
    assert ours.rms_dp == pytest.approx(theirs("RMS Δp", 0.01)[0], rel=5e-3)
    assert ours.same_top == pytest.approx(theirs("Same top p", 0.01)[0], abs=1e-3)
