"""Trained weights -> a standard GGUF file of arch llama, and the record of how they came to be.

The weights already lie as llama.cpp expects them (rope turns neighbouring pairs), so q and k rows are written
as they are. The keys are those that llama.cpp's own converter writes; norms stay F32, the rest is F16.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import Tokenizer

from qjax.formats.atomic import atomic_file
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.runs.config import TrainConfig, as_json, config_hash
from qjax.runs.train_step import Params, tensor_shapes
from qjax.runs.train_tokenizer import tokenizer_metadata

MOSTLY_F16 = 1  # llama.cpp's general.file_type


def round_to_f16(params: Params) -> Params:
    """The weights as the file will hold them: matrices rounded to float16 values, float32 still."""
    return {
        name: leaf.astype(jnp.float16).astype(jnp.float32) if leaf.ndim > 1 else leaf for name, leaf in params.items()
    }


def write_model(path: Path, config: TrainConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Writes weights and tokenizer to one GGUF file, atomically."""
    tensors = [
        _tensor(name, np.asarray(params[name]), "F32" if len(size) == 1 else "F16")
        for name, size in tensor_shapes(config.model).items()
    ]
    n_weights = sum(leaf.size for leaf in params.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, _model_metadata(config, n_weights, tokenizer), tensors)


def _tensor(name: str, weight: np.ndarray, kind: str) -> TensorToWrite:
    data = np.ascontiguousarray(weight, {"F32": "<f4", "F16": "<f2"}[kind])
    return TensorToWrite(name, weight.shape, kind, data.view(np.uint8))


def _model_metadata(config: TrainConfig, n_weights: int, tokenizer: Tokenizer) -> dict[str, Any]:
    shape = config.model
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": config.name,
        "general.description": "A small model of Python source text, trained by qjax itself",
        "general.license": "apache-2.0",
        "general.size_label": f"{n_weights / 1e6:.1f}M",
        "general.file_type": MOSTLY_F16,
        "general.quantization_version": 2,
        "llama.block_count": shape.n_layers,
        "llama.context_length": shape.context_length,
        "llama.embedding_length": shape.hidden_size,
        "llama.feed_forward_length": shape.ffn_size,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "llama.rope.freq_base": shape.rope_theta,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.vocab_size": shape.vocab_size,
    } | tokenizer_metadata(tokenizer, shape.vocab_size)


def write_record(path: Path, config: TrainConfig, model: Path, facts: dict[str, Any]) -> None:
    """Writes the JSON record: the config and its hash, the file's hash, the versions, and `facts`."""
    data = model.read_bytes()
    record = {
        "file": model.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "config_sha256": config_hash(config),
        "config": as_json(config),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
            "tokenizers": tokenizers.__version__,
        },
        **facts,
    }
    with atomic_file(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
