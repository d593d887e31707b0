"""Training is reproducible and resumes exactly; what it writes is a GGUF file that another program reads."""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.runs import run
from qjax.runs.config import TrainConfig, config_hash, load_config
from qjax.runs.train import train
from qjax.runs.train_step import Params


def identical(left: Params, right: Params) -> bool:
    return left.keys() == right.keys() and all(
        np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes() for name in left
    )


def test_a_resumed_run_ends_bit_identical(config: TrainConfig, config_file: Path) -> None:
    base = config_file.parent
    whole = train(dataclasses.replace(config, folder="whole"), base)
    part = train(config, base, stop_at=2)
    assert part.step == 2
    assert not identical(part.params, whole.params)
    resumed = train(config, base)
    assert resumed.step == whole.step == 3
    assert identical(resumed.params, whole.params)
    assert resumed.history == whole.history


def test_a_checkpoint_of_another_run_is_refused(config: TrainConfig, config_file: Path) -> None:
    base = config_file.parent
    train(config, base, stop_at=1)
    with pytest.raises(QjaxError, match="another seed than the config says"):
        train(dataclasses.replace(config, seed=4), base)
    train(dataclasses.replace(config, checkpoint_minutes=9.0), base, stop_at=1)
    (base / "texts" / "c.py").write_text("c = 1\n" * 200, encoding="utf-8")
    with pytest.raises(QjaxError, match="trained on other files"):
        train(config, base)
    assert train(config, base, resume=False, stop_at=1).step == 1


def test_loss_and_heldout_perplexity_fall(config: TrainConfig, config_file: Path) -> None:
    optimizer = dataclasses.replace(config.optimizer, steps=40, warmup_steps=5)
    trained = train(dataclasses.replace(config, optimizer=optimizer, evaluate_every=10), config_file.parent)
    losses = [entry["loss"] for entry in trained.history]
    perplexities = [entry["heldout_perplexity"] for entry in trained.history]
    assert losses[-1] < 0.6 * losses[0]
    assert perplexities[-1] < 0.3 * perplexities[0] < 100


def test_too_little_held_out_is_refused(config: TrainConfig, config_file: Path) -> None:
    (config_file.parent / "texts" / "b.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(QjaxError, match="held_out: expected at least 32 tokens"):
        train(config, config_file.parent)


def test_too_small_a_corpus_is_refused(config: TrainConfig, config_file: Path) -> None:
    for name in "ac":
        (config_file.parent / "texts" / f"{name}.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(QjaxError, match="corpus: expected at least 64 tokens"):
        train(config, config_file.parent)


def test_a_run_writes_a_model_and_its_record(config_file: Path) -> None:
    output = run(config_file)
    assert output == config_file.parent / "toy.gguf"
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["config_sha256"] == config_hash(load_config(config_file))
    assert record["tokens_seen"] == 3 * 2 * 32
    assert set(record["corpus"]["files"]) == {"a.py", "c.py"}
    assert set(record["heldout"]["files"]) == {"b.py"}

    # The oracle is the gguf package's own reader.
    reader = gguf.GGUFReader(output)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if tensor.name[:4] != "blk."} == {
        "token_embd.weight": "F16",
        "output_norm.weight": "F32",
    }
    layers = {tensor.name.split(".", 2)[2] for tensor in reader.tensors if tensor.name[:4] == "blk."}
    attention, ffn = ("norm", "q", "k", "v", "output"), ("norm", "gate", "up", "down")
    names = [f"attn_{name}" for name in attention] + [f"ffn_{name}" for name in ffn]
    assert layers == {f"{name}.weight" for name in names}
    assert reader.fields["llama.attention.head_count_kv"].contents() == 1
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 300
    params = train(load_config(config_file), config_file.parent).params
    for tensor in reader.tensors:
        expected = np.asarray(params[tensor.name]).astype(tensor.data.dtype)
        np.testing.assert_array_equal(tensor.data, expected)
