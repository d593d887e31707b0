"""Folders that llm-compressor and AutoRound quantized: found for what they are, packed, with the peers' figures.

`expected.json` has what transformers measured of the same folders: perplexity over all chunks of the held-out text, and
mean KL divergence to the float model over the first 32.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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


def stored_tensors(path: Path) -> dict[str, np.ndarray]:
    """What a safetensors file holds, without qjax."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    dtypes = {"I32": np.int32, "I64": np.int64, "I8": np.int8, "F16": np.float16, "F32": np.float32}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[first:last], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found


def bits_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of int32 words along the last axis, lowest bits first, without qjax."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits))


def decoded(tensors: dict[str, np.ndarray], kind: str, bits: int) -> np.ndarray:
    """float32 [out, in] of a module by the formats' descriptions."""
    if kind == "gptq":
        group, scale = tensors["g_idx"], tensors["scales"].astype(np.float32)
        # As GPTQModel makes version 2 of version 1; of 3 bits field by field.
        ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}.get(bits, 0)
        words = (tensors["qzeros"].astype(np.int64) + ones).astype(np.uint32)
        zero = bits_of(words, bits) + (bits == 3)
        return (scale[group] * (bits_of(tensors["qweight"].T, bits).T - zero[group])).T
    if kind == "awq":
        order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
        codes, zero = (bits_of(tensors[name], 4).reshape(-1, 8)[:, order] for name in ("qweight", "qzeros"))
        scale = tensors["scales"].astype(np.float32)
        codes, zero = codes.reshape(-1, scale.shape[1]), zero.reshape(scale.shape)
        group = np.arange(len(codes)) * len(scale) // len(codes)
        return (scale[group] * (codes - zero[group])).T
    codes = tensors["weight"] if "weight" in tensors else bits_of(tensors["weight_packed"], bits) - (1 << (bits - 1))
    scale = tensors["weight_scale"].astype(np.float32)
    zero = np.zeros(scale.shape, np.int64)
    if "weight_zero_point" in tensors:
        zero = bits_of(tensors["weight_zero_point"].T, bits).T[: len(zero)] - (1 << (bits - 1))
    group = np.arange(codes.shape[1]) * scale.shape[1] // codes.shape[1]
    return scale[:, group] * (codes - zero[:, group])


@pytest.mark.parametrize("name", sorted(set(FOLDERS) - {"hf-ct-fp8-dynamic"}))
def test_weights_are_those_of_the_file(interop: Path, name: str) -> None:
    kind, bits, _ = FOLDERS[name]
    source = open_source(interop / name)
    stored = stored_tensors(interop / name / "model.safetensors")
    for tensor, found in source.found.items():
        prefix = f"{found.module}."
        tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        expected = decoded(tensors, kind, bits).astype(np.float32)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.split(".")[2])
        if heads is not None:
            halves = expected.reshape(heads, 2, len(expected) // heads // 2, -1)
            expected = halves.swapaxes(1, 2).reshape(expected.shape)
        np.testing.assert_array_equal(dequantized(jax.tree.map(jnp.asarray, source.array(tensor))), expected)


@jax.jit
def dequantized(array: Any) -> jax.Array:
    return array.dequantize()
