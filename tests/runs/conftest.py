"""A corpus of a few small files and a config whose training takes a second."""

import sys
from pathlib import Path

import pytest

from qjax.runs.config import TrainConfig, load_config

# Test files are no package: what several of them use (`looking.py`) is found there.
sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))

CONFIG = """
kind: train
name: toy
seed: 3
folder: work
output: toy.gguf
corpus: {folder: texts, held_out: [b.py]}
model: {vocab_size: 300, hidden_size: 32, n_layers: 1, n_heads: 2, n_kv_heads: 1, head_dim: 16, ffn_size: 48,
        context_length: 32}
optimizer: {steps: 3, batch_size: 2, learning_rate: 1.0e-2, warmup_steps: 1}
evaluate_every: 2
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for letter in "abc":
        lines = [f"def {letter}_{n}(x):\n    return x * {n} + {letter}_{n - 1}(x)\n" for n in range(40)]
        (folder / f"{letter}.py").write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def config(config_file: Path) -> TrainConfig:
    return load_config(config_file)
