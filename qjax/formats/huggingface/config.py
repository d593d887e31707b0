"""config.json, read with the defaults that transformers has for what it leaves out.

Source: the configuration_*.py of transformers 5.17's llama, mistral, qwen2 and qwen3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface.json_files import read_object

# Class of transformers -> GGUF's arch.
ARCHS = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "LLaMAForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


@dataclass(frozen=True)
class Config:
    """What a config.json says; `arch` is GGUF's."""

    path: Path
    architecture: str
    values: Mapping[str, Any]

    @property
    def arch(self) -> str:
        return ARCHS[self.architecture]

    def get(self, key: str, default: Any = None) -> Any:
        """A value; what is null counts as left out."""
        value = self.values.get(key)
        value = _DEFAULTS[self.architecture].get(key) if value is None and key not in self.values else value
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive number of sane size.

        Raises:
            FormatError: it is not there, or is none.
        """
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 24:
            raise FormatError(f"{self.path}: {key} is {shown(str(value))}, expected a whole number from 1 on")
        return value

    def number(self, key: str, default: float, values: Mapping[str, Any] | None = None) -> float:
        """A positive number, of `values` if given.

        Raises:
            FormatError: it is none.
        """
        value = self.get(key, default) if values is None else values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise FormatError(f"{self.path}: {key} is {shown(str(value))}, expected a positive number")
        return float(value)

    @property
    def head_dim(self) -> int:
        return self.count("head_dim", self.count("hidden_size") // self.count("num_attention_heads"))

    @property
    def rope(self) -> dict[str, Any]:
        """Rope's parameters, in the newer spelling: rope_type, rope_theta, and what scaling needs."""
        found = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(found, dict):
            raise FormatError(f"{self.path}: rope_parameters is {shown(str(found))}, expected an object")
        theta = self.get("rope_theta", 10000.0)
        return {"rope_type": found.get("type", "default"), "rope_theta": theta, **found}


def read_config(path: Path) -> Config:
    """Read a config.json.

    Raises:
        FormatError: it is missing or damaged.
        UnsupportedError: an architecture, or an activation of one, that is not known.
    """
    values = read_object(path)
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHS:
        raise UnsupportedError(f"{path}: architecture {shown(str(name))} is not known; known are {', '.join(ARCHS)}")
    config = Config(path, name, values)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"{path}: hidden_act {shown(str(activation))} is not known; known is silu")
    return config
