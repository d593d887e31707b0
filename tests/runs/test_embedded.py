"""The model inside the package is the one that its record and its config speak of."""

import hashlib
import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import qjax
from qjax.runs import corpus
from qjax.runs.config import as_json, config_hash, load_config
from qjax.runs.train_step import heldout_perplexity, tensor_shapes

DATA = Path(qjax.__file__).parent / "data"
CONFIG = load_config(Path(__file__).parents[2] / "configs" / "embedded.yaml")
RECORD = json.loads((DATA / "embedded.json").read_text(encoding="utf-8"))
BYTES_AT_MOST = 8_000_000


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(DATA / "embedded.gguf")


@pytest.fixture(scope="module")
def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """From the file's metadata, as any program that knows GPT-2's tokenizer would build it."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return built


def test_the_record_is_of_this_file_and_this_config() -> None:
    data = (DATA / "embedded.gguf").read_bytes()
    assert hashlib.sha256(data).hexdigest() == RECORD["sha256"]
    assert len(data) == RECORD["bytes"] <= BYTES_AT_MOST
    assert RECORD["config"] == as_json(CONFIG)
    assert RECORD["config_sha256"] == config_hash(CONFIG)
    assert RECORD["steps"] == CONFIG.optimizer.steps


def test_nothing_held_out_was_trained_on() -> None:
    assert set(RECORD["heldout"]["files"]) == set(corpus.HELD_OUT) == set(CONFIG.corpus.held_out)
    assert not set(RECORD["heldout"]["files"]) & set(RECORD["corpus"]["files"])
    assert not set(RECORD["heldout"]["files"].values()) & set(RECORD["corpus"]["files"].values())
    assert corpus.corpus_hash(RECORD["corpus"]["files"]) == RECORD["corpus"]["sha256"]


def test_tensors_are_those_of_the_config_and_fit_every_type(reader: gguf.GGUFReader) -> None:
    assert {tensor.name: tensor.data.shape for tensor in reader.tensors} == tensor_shapes(CONFIG.model)
    assert all(tensor.data.shape[-1] % 256 == 0 for tensor in reader.tensors)
    assert all(np.isfinite(tensor.data.astype(np.float32)).all() for tensor in reader.tensors)


def test_its_tokenizer_gives_text_back(tokenizer: Tokenizer) -> None:
    text = corpus.heldout_text()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_perplexity_on_heldout_text_is_as_recorded(reader: gguf.GGUFReader, tokenizer: Tokenizer) -> None:
    params = {tensor.name: jnp.asarray(tensor.data, jnp.float32) for tensor in reader.tensors}
    text = corpus.heldout_text()
    found = heldout_perplexity(params, CONFIG.model, tokenizer.encode(text).ids)
    if corpus.file_hashes(corpus.HELD_OUT) == RECORD["heldout"]["files"]:
        assert found == pytest.approx(RECORD["heldout"]["perplexity"], rel=1e-4)
    else:
        # Another Python's library: other text, but no other language.
        assert found == pytest.approx(RECORD["heldout"]["perplexity"], rel=0.25)
