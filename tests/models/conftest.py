"""Small random model files, whole or spoilt on purpose."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.gguf.writer import TensorToWrite, write_gguf

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 8, 4, 32, 96
Tensors = dict[str, tuple[tuple[int, ...], str]]
WriteModel = Callable[..., Path]


def metadata(arch: str, layers: int, ffn: int) -> dict[str, Any]:
    return {
        "general.architecture": arch,
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": ffn,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
    }


def tensors(arch: str, matrix: str, layers: int, ffn: int) -> Tensors:
    """Shape and type of each tensor; matrices have the given type."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    result: Tensors = {
        "token_embd.weight": ((VOCAB, HIDDEN), matrix),
        "output.weight": ((VOCAB, HIDDEN), matrix),
        "output_norm.weight": ((HIDDEN,), "F32"),
    }
    for i in range(layers):
        layer: Tensors = {
            "attn_norm.weight": ((HIDDEN,), "F32"),
            "attn_q.weight": ((q, HIDDEN), matrix),
            "attn_k.weight": ((kv, HIDDEN), matrix),
            "attn_v.weight": ((kv, HIDDEN), matrix),
            "attn_output.weight": ((HIDDEN, q), matrix),
            "ffn_norm.weight": ((HIDDEN,), "F32"),
            "ffn_gate.weight": ((ffn, HIDDEN), matrix),
            "ffn_up.weight": ((ffn, HIDDEN), matrix),
            "ffn_down.weight": ((HIDDEN, ffn), matrix),
        }
        if arch == "qwen2":
            layer |= {f"attn_{x}.bias": ((n,), "F32") for x, n in (("q", q), ("k", kv), ("v", kv))}
        if arch == "qwen3":
            layer |= {f"attn_{x}_norm.weight": ((HEAD_DIM,), "F32") for x in "qk"}
        result |= {f"blk.{i}.{name}": entry for name, entry in layer.items()}
    return result


def random_bytes(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a tensor whose numbers are of a weight's size."""
    if kind in ("F32", "F16"):
        mean, deviation = (1.0, 0.3) if len(shape) < 2 else (0.0, shape[-1] ** -0.5)
        values = np.asarray(rng.normal(mean, deviation, shape))
        return np.atleast_1d(values.astype(np.float32 if kind == "F32" else np.float16)).view(np.uint8)
    block = GGML_TYPES[kind]
    count = int(np.prod(shape)) // block.block_size
    data = rng.integers(0, 256, (count, block.block_bytes), dtype=np.uint8)
    if kind in ("Q4_0", "Q8_0"):
        # The scale is a block's first two bytes; the largest code is to be about 2 / sqrt(columns).
        scale = np.float16(2 * shape[-1] ** -0.5 / (8 if kind == "Q4_0" else 128))
        data[:, :2] = np.full(count, scale).view(np.uint8).reshape(-1, 2)
    return data


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """`write_model(arch, matrix, meta={key: value}, change={tensor: (shape, type)}, data={tensor: bytes}) -> path`.

    None as value takes a key or tensor out. Keys may leave out the architecture: ".block_count".
    """

    def write(
        arch: str = "llama",
        matrix: str = "F16",
        *,
        layers: int = 2,
        ffn: int = FFN,
        meta: Mapping[str, Any] | None = None,
        change: Mapping[str, tuple[tuple[int, ...], str] | None] | None = None,
        data: Mapping[str, np.ndarray] | None = None,
    ) -> Path:
        changed = {arch + key if key.startswith(".") else key: value for key, value in (meta or {}).items()}
        keys = {key: value for key, value in (metadata(arch, layers, ffn) | changed).items() if value is not None}
        entries = {
            name: entry for name, entry in (tensors(arch, matrix, layers, ffn) | dict(change or {})).items() if entry
        }
        rng = np.random.default_rng(11)
        path = tmp_path_factory.mktemp("model") / "model.gguf"
        write_gguf(
            path,
            keys,
            [
                TensorToWrite(name, shape, kind, (data or {}).get(name, random_bytes(shape, kind, rng)))
                for name, (shape, kind) in entries.items()
            ],
        )
        return path

    return write
