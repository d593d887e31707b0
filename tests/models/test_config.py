"""Sizes and switches from metadata: defaults as llama.cpp's, and one clear line for what makes no sense."""

from typing import Any

import numpy as np
import pytest

from qjax.errors import FormatError, UnsupportedError
from qjax.models.config import ModelConfig, config_from_gguf

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def config(**changes: Any) -> ModelConfig:
    """Config of METADATA with `llama.` keys changed; `__` stands for a dot, None takes a key out."""
    renamed = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    return config_from_gguf({key: value for key, value in (METADATA | renamed).items() if value is not None}, 160)


def test_defaults_are_llama_cpp_s() -> None:
    assert config() == ModelConfig(
        arch="llama",
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=4,
        head_dim=16,
        ffn=96,
        vocab=160,
        context=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_dim=16,
        rope_factor=1.0,
        window=None,
    )
    assert {config(): 1}[config()] == 1


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scale_linear": 2.0}, 2.0),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4}, 4.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, 1.0),
        ({"rope__scaling__factor": 0.0}, 1.0),
    ],
)
def test_rope_factor_is_read_as_llama_cpp_reads_it(keys: dict[str, Any], factor: float) -> None:
    assert config(**keys).rope_factor == factor


def test_a_window_of_zero_is_none() -> None:
    assert config(attention__sliding_window=0).window is None
    assert config(attention__sliding_window=7).window == 7


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"block_count": None}, FormatError, "lacks 'llama.block_count'"),
        ({"block_count": 0}, FormatError, "'llama.block_count' is 0, expected 1 to"),
        ({"block_count": 2**31}, FormatError, "'llama.block_count' is 2147483648"),
        ({"embedding_length": "64"}, FormatError, "'llama.embedding_length' is str, expected one int"),
        ({"embedding_length": True}, FormatError, "is bool, expected one int"),
        ({"attention__head_count": np.array([4, 4])}, FormatError, "is ndarray, expected one int"),
        ({"attention__head_count_kv": 3}, FormatError, "4 attention heads cannot share 3"),
        ({"attention__value_length": 8}, UnsupportedError, "keys and values of different length"),
        ({"attention__sliding_window": -1}, FormatError, "'llama.attention.sliding_window' is -1"),
        ({"attention__sliding_window": 2**32 - 1}, FormatError, "sliding_window' is 4294967295"),
        ({"rope__dimension_count": 18}, FormatError, "rotary dimension 18 does not fit heads of 16"),
        ({"rope__dimension_count": 15}, FormatError, "rotary dimension 15 does not fit"),
        ({"rope__scaling__type": "yarn"}, UnsupportedError, "'yarn' is not known; known are none, linear .and Llama 3"),
        ({"rope__scaling__type": "llama3"}, UnsupportedError, "'llama3' is not known; .* by rope_freqs.weight"),
        ({"rope__scaling__factor": -2.0}, FormatError, "rope factor -2.0"),
        ({"rope__freq_base": float("nan")}, FormatError, "rope base nan"),
        ({"rope__freq_base": 1e300}, FormatError, "rope base 1e[+]300"),
        ({"attention__layer_norm_rms_epsilon": float("inf")}, FormatError, "norm epsilon inf"),
        ({"expert_count": 8}, UnsupportedError, "mixture of experts .* known are dense llama, qwen2, qwen3"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(keys: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        config(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", ["gemma3", "LLAMA", "", "x" * 100_000])
def test_an_unknown_architecture_lists_the_known(arch: str) -> None:
    with pytest.raises(UnsupportedError, match=r"is not known; known are llama, qwen2, qwen3$") as caught:
        config_from_gguf({"general.architecture": arch}, 160)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": 3}])
def test_no_architecture_is_no_model(metadata: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"lacks 'general\.architecture': this is no model file"):
        config_from_gguf(metadata, 160)
