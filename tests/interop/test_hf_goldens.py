"""Hugging Face folders: the file that llama.cpp's converter makes, byte for byte, and the logits of transformers.

The stored folders were made by `make_hf_goldens.py`.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

import qjax
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.source import open_source
from qjax.models import forward, init_cache

FOLDER = Path(__file__).parent / "goldens" / "hf"
NAMES = ["llama-3", "llama-spm", "mistral", "qwen2", "qwen3"]
# What the converter leaves out, and llama.cpp with it: how far Mistral looks back.
OURS = {"mistral": "llama.attention.sliding_window"}
# Of the largest logit.
TOLERANCE = 1e-5
TEXT = "def f(x):\n    return 'I''LL be 12345 über 😀'\r\n\n\t## --- 3.14 <|im_end|>"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_the_converters(name: str, tmp_path: Path) -> None:
    target = tmp_path / "converted.gguf"
    qjax.convert(FOLDER / name, target)
    if name in OURS:
        file = open_gguf(target)
        metadata = {key: value for key, value in file.metadata.items() if key != OURS[name]}
        assert len(metadata) == len(file.metadata) - 1
        tensors = [TensorToWrite(n, t.shape, t.type, file.raw(n)) for n, t in file.tensors.items()]
        write_gguf(target, metadata, tensors, metadata_types=file.metadata_types)
    stored = json.loads((FOLDER / "converted.json").read_text(encoding="utf-8"))["sha256"]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == stored[name]


@pytest.mark.parametrize("name", ["llama-3", "qwen2"])
def test_logits_are_those_of_transformers(name: str) -> None:
    model = qjax.load(FOLDER / name)
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as stored:
        tokens, want = stored["tokens"], stored["logits"]
    cache = init_cache(model.config, 1, len(tokens), jnp.float32)
    run = jax.jit(forward, static_argnums=1)
    got = np.asarray(run(model.params, model.config, jnp.asarray(tokens)[None], cache)[0])[0]
    assert np.abs(got[-len(want) :] - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", ["llama-3", "qwen2", "qwen3"])
def test_text_is_cut_as_the_tokenizer_itself_does(name: str) -> None:
    theirs = HuggingFaceTokenizer.from_file(str(FOLDER / name / "tokenizer.json"))
    ours = qjax.api.read_tokenizer(open_source(FOLDER / name).metadata, FOLDER)
    assert ours.add_bos == (name == "llama-3")
    found = ours.encode(TEXT, add_bos=ours.add_bos, parse_special=True)
    assert found == theirs.encode(TEXT).ids
    assert len(found) > 40


@pytest.mark.interop
def test_what_was_trained_by_the_peers(interop: Path, tmp_path: Path) -> None:
    """The converter's file of a trained model, made when its folder was called "model" and had fewer files."""
    theirs = open_gguf(interop / "tiny-f16.gguf")
    qjax.convert(interop / "hf-float", tmp_path / "f16.gguf", quantize="f16")
    ours = open_gguf(tmp_path / "f16.gguf")
    assert list(ours.tensors) == list(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name].shape, ours.tensors[name].type) == (tensor.shape, tensor.type)
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))
    differ = {"general.name", *(f"tokenizer.ggml.{key}" for key in ("unknown_token_id", "add_sep_token"))}
    differ.add("tokenizer.ggml.add_eos_token")
    for key in ours.metadata.keys() | theirs.metadata.keys():
        if key not in differ:
            assert ours.metadata_types[key] == theirs.metadata_types[key]
            np.testing.assert_array_equal(ours.metadata[key], theirs.metadata[key])
    qjax.convert(interop / "hf-float", tmp_path / "bf16.gguf", quantize="bf16")
    ours, theirs = open_gguf(tmp_path / "bf16.gguf"), open_gguf(interop / "tiny-bf16.gguf")
    for name in theirs.tensors:
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))


@pytest.mark.interop
def test_logits_of_what_was_trained(interop: Path) -> None:
    model = qjax.load(interop / "hf-float")
    with np.load(interop / "hf-float-logits.npz", allow_pickle=False) as stored:
        ids, want, greedy = stored["ids"], stored["logits"], stored["greedy"]
    cache = init_cache(model.config, 1, len(ids.ravel()), jnp.float32)
    run = jax.jit(forward, static_argnums=1)
    got = np.asarray(run(model.params, model.config, jnp.asarray(ids, jnp.int32).reshape(1, -1), cache)[0])[0]
    assert np.abs(got - want.reshape(got.shape)).max() <= TOLERANCE * np.abs(want).max()
    greedy = greedy.ravel().tolist()
    made = model.stream(greedy[:-48], max_tokens=48, temperature=0, cache_dtype=jnp.float32, activations="float")
    assert [piece.id for piece in made if piece.id is not None] == greedy[-48:]
