"""Folders that llm-compressor and AutoRound quantized: found for what they are, packed, with the peers' figures.

`expected.json` has what transformers measured of the same folders: perplexity over all chunks of the held-out text, and
mean KL divergence to the float model over the first 32.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qjax
from qjax.arrays import QuantizedArray
from qjax.evaluate.perplexity import negative_log_likelihood, scored
from qjax.formats.source import open_source
from qjax.models.chunks import chunks_of

pytestmark = pytest.mark.interop

CTX, BASE_CHUNKS = 512, 32
# What each is, of how many bits, and how near perplexity has to be: activations that are rounded may round elsewhere.
FOLDERS = {
    "hf-awq-w4g128": ("awq", 4, 1e-3),
    "hf-awq-w4g32-sym": ("awq", 4, 1e-3),
    "hf-ct-fp8-dynamic": ("fp8", 8, 5e-3),
    "hf-ct-gptq-w4g128": ("pack-quantized", 4, 1e-3),
    "hf-ct-gptq-w4g128-asym": ("pack-quantized", 4, 1e-3),
    "hf-ct-int8-w8a16": ("pack-quantized", 8, 1e-3),
    "hf-ct-int8-w8a8": ("int-quantized", 8, 5e-3),
    "hf-gptq-w2g32-asym": ("gptq", 2, 1e-3),
    "hf-gptq-w3g128": ("gptq", 3, 1e-3),
    "hf-gptq-w4g128": ("gptq", 4, 1e-3),
    "hf-gptq-w4g128-asym": ("gptq", 4, 1e-3),
    "hf-gptq-w8g32": ("gptq", 8, 1e-3),
}


def log_probabilities(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.fixture(scope="module")
def chunks(interop: Path) -> tuple[np.ndarray, int | None]:
    """Chunks of the held-out text, and what each begins with."""
    model = qjax.load(interop / "hf-float")
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    ids = model.encode((interop / "heldout.txt").read_text(encoding="utf-8"))
    return chunks_of(model.config, ids, n_ctx=CTX, bos_id=bos, chunks=None), bos


@pytest.fixture(scope="module")
def base(interop: Path, chunks: tuple[np.ndarray, int | None]) -> list[np.ndarray]:
    """The float model's log-probabilities, chunk by chunk."""
    model = qjax.load(interop / "hf-float")
    found = scored(model.params, model.config, chunks[0][:BASE_CHUNKS], bos_id=chunks[1], activations="float")
    return [log_probabilities(logits) for logits, _ in found]


def test_all_folders_are_tried(interop: Path) -> None:
    there = {path.name for path in interop.glob("hf-*") if path.is_dir()}
    assert there - {"hf-float"} == set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_found_stays_packed(interop: Path, name: str) -> None:
    kind, bits, _ = FOLDERS[name]
    source, model = open_source(interop / name), qjax.load(interop / name)
    assert model.found == dict(source.found)
    assert len(source.found) == 7 * model.config.layers
    assert {(found.kind, found.bits) for found in source.found.values()} == {(kind, bits)}
    held = [array for layer in model.params["layers"] for array in layer.values() if isinstance(array, QuantizedArray)]
    in_file = sum(source.tensors[name].nbytes for name in source.found)
    assert sum(array.nbytes for array in held) == pytest.approx(in_file, rel=0.05)


@pytest.mark.parametrize("name", FOLDERS)
def test_figures_are_the_peers(
    interop: Path, name: str, chunks: tuple[np.ndarray, int | None], base: list[np.ndarray]
) -> None:
    model = qjax.load(interop / name)
    losses, divergences = [], []
    found = scored(model.params, model.config, chunks[0], bos_id=chunks[1], activations="float")
    for i, (logits, targets) in enumerate(found):
        losses.append(np.asarray(negative_log_likelihood(logits, targets), np.float64))
        if i < len(base):
            own = log_probabilities(logits)
            divergences.append((np.exp(base[i]) * (base[i] - own)).sum(-1))
    expected = json.loads((interop / "expected.json").read_text(encoding="utf-8"))["hf"][name]
    assert np.concatenate(losses).size == expected["scored"]
    perplexity, kld = np.exp(np.concatenate(losses).mean()), np.concatenate(divergences).mean()
    print(f"{name}: perplexity {perplexity:.5f} ({expected['perplexity']}), KLD {kld:.6f}")
    assert perplexity == pytest.approx(expected["perplexity"], rel=FOLDERS[name][2])
    # Of AutoRound's 4 and 8 bits the peers' own kernels on CPUs round what they multiply: they are further away.
    assert kld == pytest.approx(expected["mean_kld_first_32_chunks"], rel=0.05, abs=3.5e-5)
