"""Small vocabularies written out, and the real ones of llama.cpp, opened once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.formats.gguf.container import open_gguf
from qjax.text.byte_pairs import BYTE_TO_LETTER
from qjax.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def spm_metadata(pieces: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: <unk>, <s>, </s>, 256 bytes, one user-defined, then the pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|tool|>", *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * len(pieces)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 260 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def bpe_metadata(*merges: str, **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: 256 letters, the joins of the merges, <|end|>, <|im_start|>."""
    tokens = [*BYTE_TO_LETTER.values(), *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, "<|end|>", "<|im_start|>"],
        "tokenizer.ggml.token_type": np.array([NORMAL] * len(tokens) + [CONTROL, USER_DEFINED], np.int32),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": len(tokens),
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


@pytest.fixture(scope="session")
def spm() -> Callable[..., dict[str, Any]]:
    return spm_metadata


@pytest.fixture(scope="session")
def bpe() -> Callable[..., dict[str, Any]]:
    return bpe_metadata


@pytest.fixture(scope="session")
def real_tokenizer(vocab_folder: Path) -> Callable[[str], Tokenizer]:
    """`real_tokenizer("llama-spm")`: a tokenizer of llama.cpp's own test vocabularies."""
    made: dict[str, Tokenizer] = {}

    def make(name: str) -> Tokenizer:
        if name not in made:
            path = vocab_folder / f"ggml-vocab-{name}.gguf"
            if not path.exists():
                pytest.skip(f"no vocabulary {path}")
            made[name] = Tokenizer.from_gguf(open_gguf(path).metadata)
        return made[name]

    return make
