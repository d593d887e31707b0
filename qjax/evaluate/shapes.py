"""Sizes of well-known models, for measuring speed without their weights, and the metadata that a file of them needs."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np

from qjax.errors import QjaxError
from qjax.formats.gguf.mixes import file_type
from qjax.models import ModelConfig


@dataclass(frozen=True)
class Shape:
    """A model without its weights: the name to ask for it by, and its sizes."""

    name: str
    config: ModelConfig


def llama(*, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, context: int) -> ModelConfig:
    """Config of a Llama 2 of these sizes."""
    return ModelConfig(
        arch="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocab,
        context=context,
        # As it comes back from a file, which holds it as float32.
        norm_eps=float(np.float32(1e-5)),
        rope_theta=1e4,
        rope_dim=hidden // heads,
    )


# TinyLlama: arXiv:2401.02385; Llama 2: arXiv:2307.09288.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "tinyllama-1.1b",
            llama(layers=22, hidden=2048, heads=32, kv_heads=4, ffn=5632, vocab=32000, context=2048),
        ),
        Shape(
            "llama-7b",
            llama(layers=32, hidden=4096, heads=32, kv_heads=32, ffn=11008, vocab=32000, context=4096),
        ),
        Shape(
            "llama-13b",
            llama(layers=40, hidden=5120, heads=40, kv_heads=40, ffn=13824, vocab=32000, context=4096),
        ),
    )
}


def shape_of(name: str) -> Shape:
    """The shape of this name.

    Raises:
      QjaxError: no such shape; lists the known ones.
    """
    found = SHAPES.get(name.lower())
    if found is None:
        raise QjaxError(f"shape {name!r} is not known, expected one of {', '.join(SHAPES)}")
    return found


def _words() -> Iterator[str]:
    """ "▁", a, b, ... z, aa, ab, ...: each can be merged from shorter ones, as a tokenizer expects."""
    yield "▁"
    for length in itertools.count(1):
        yield from map("".join, itertools.product(ascii_lowercase, repeat=length))


def vocabulary(size: int) -> dict[str, Any]:
    """Tokenizer metadata of a made-up SentencePiece vocabulary of `size` tokens, enough for llama.cpp to open a file.

    Raises:
      QjaxError: `size` has no room for the three special tokens and the 256 bytes.
    """
    special, byte_count = ["<unk>", "<s>", "</s>"], 256
    if size < len(special) + byte_count:
        raise QjaxError(f"expected a vocabulary of at least {len(special) + byte_count} tokens, got {size}")
    count = size - len(special) - byte_count
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(byte_count)), *itertools.islice(_words(), count)]
    # llama.cpp's llama_token_type: 1 normal, 2 unknown, 3 control, 6 byte.
    types = [2, 3, 3] + [6] * byte_count + [1] * count
    scores = np.zeros(size, np.float32)
    scores[len(special) + byte_count :] = -np.arange(count, dtype=np.float32)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def metadata(shape: Shape, mix: str) -> dict[str, Any]:
    """GGUF metadata of a file with made-up weights of this shape and mix.

    Raises:
      QjaxError: unknown mix, or a vocabulary that is too small.
    """
    config, prefix = shape.config, shape.config.arch
    sizes = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rope_dim,
        "vocab_size": config.vocab,
    }
    return {
        "general.architecture": prefix,
        "general.type": "model",
        "general.name": f"{shape.name} with made-up weights",
        **{f"{prefix}.{key}": value for key, value in sizes.items()},
        **vocabulary(config.vocab),
        "general.quantization_version": 2,
        "general.file_type": file_type(mix),
    }
