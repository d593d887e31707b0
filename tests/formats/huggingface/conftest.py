"""Small folders that transformers saved, to be spoilt."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Test files are no package: what several of them use is found beside them.
sys.path.insert(0, str(Path(__file__).parent))
import packers

STORED = Path(__file__).parents[2] / "interop" / "goldens" / "hf"


@pytest.fixture
def change() -> Callable[..., None]:
    """`change(path, **values)`: change keys of a JSON file; None takes one out."""

    def changed(path: Path, **changes: Any) -> None:
        values = json.loads(path.read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return changed


@pytest.fixture
def copied(tmp_path: Path, change: Callable[..., None]) -> Callable[..., Path]:
    """`copied(name, **values)`: a copy of a stored folder, with its config.json changed."""

    def copy(name: str = "llama-3", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(STORED / name, folder)
        change(folder / "config.json", **changes)
        return folder

    return copy


# A Llama of one layer whose rows and columns all packers can pack.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 32, "num_hidden_layers": 1, "tie_word_embeddings": False, "attention_bias": False}
MATRICES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}


@pytest.fixture
def made(copied: Callable[..., Path]) -> Callable[..., Path]:
    """`made(tensors, **config)`: a folder of that Llama whose layer has `tensors`, the rest being floats."""

    def make(tensors: packers.Tensors, **config: Any) -> Path:
        folder = copied("llama-3", **SIZES, **config)
        rng = np.random.default_rng(0)
        floats: packers.Tensors = {
            "model.embed_tokens.weight": ("F16", rng.normal(size=(320, 128)).astype(np.float16)),
            "lm_head.weight": ("F16", rng.normal(size=(320, 128)).astype(np.float16)),
            "model.norm.weight": ("F16", np.ones(128, np.float16)),
            "model.layers.0.input_layernorm.weight": ("F16", np.ones(128, np.float16)),
            "model.layers.0.post_attention_layernorm.weight": ("F16", np.ones(128, np.float16)),
        }
        packers.write_safetensors(folder / "model.safetensors", dict(sorted((floats | tensors).items())))
        return folder

    return make
