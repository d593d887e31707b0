"""config.json and generation_config.json of a model that has none: made from GGUF's metadata.

The reverse of `metadata.py`, in the spelling that old and new readers know (rope_theta and rope_scaling).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from qjax.errors import UnsupportedError
from qjax.formats.huggingface.config import Config
from qjax.formats.huggingface.metadata import rope_factors

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Llama 3's scaling as all models have it, and the contexts that one may have been trained on first.
_LOW, _HIGH, _CONTEXTS = 1.0, 4.0, tuple(1 << i for i in range(5, 20))
_BIASED = ("q_proj", "k_proj", "v_proj", "o_proj")


def config_of(
    metadata: Mapping[str, Any],
    names: Collection[str],
    vocab: int,
    dtype: str,
    factors: Float32[np.ndarray, " half"] | None,
) -> dict[str, Any]:
    """The values of a config.json.

    Args:
      metadata: GGUF's. names: of all weights, as a checkpoint has them. vocab: rows of the embedding. dtype: of what is
        not quantized, "float16" or "bfloat16". factors: rope_freqs.weight, if the model has it.

    Raises:
      UnsupportedError: what no config.json of the architecture says.
    """
    arch = metadata["general.architecture"]
    get = lambda key, default=None: metadata.get(f"{arch}.{key}", default)
    window = get("attention.sliding_window") or None
    mistral = arch == "llama" and window is not None
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{arch}.rope.dimension_count is not that of a head: config.json has no words for it")
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if mistral else _CLASSES[arch]],
        "model_type": "mistral" if mistral else arch,
        "dtype": dtype,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(get("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "use_cache": True,
    }
    for role, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if i is not None or role in ("bos", "eos"):
            config[f"{role}_token_id"] = i
    if window is not None or mistral:
        config["sliding_window"] = window
    if window is not None and not mistral:
        config |= {"use_sliding_window": True, "max_window_layers": 0}
    biased = {part for part in _BIASED if f"model.layers.0.self_attn.{part}.bias" in names}
    if arch != "qwen2":
        if biased not in (set(), set(_BIASED)) or (biased and mistral):
            raise UnsupportedError(f"biases of {', '.join(sorted(biased))} alone: no {arch} of transformers has them")
        config["attention_bias"] = bool(biased)
    if arch == "llama" and not mistral:
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in names
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if factor != 1.0 and get("rope.scaling.type", "linear") == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": shortest(factor)}
    if factors is not None:
        config["rope_scaling"] = _llama3_scaling(config, factors)
    return config


def generation_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a generation_config.json: the tokens that begin and end a text."""
    key = "tokenizer.ggml.{}_token_id".format
    ids = {f"{role}_token_id": metadata.get(key(role)) for role in ("bos", "eos")}
    return {"_from_model_config": True, **{name: i for name, i in ids.items() if i is not None}}


def shortest(number: float) -> float:
    """The shortest decimal number that is this one in float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _llama3_scaling(config: dict[str, Any], factors: Float32[np.ndarray, " half"]) -> dict[str, Any]:
    # Long waves are divided by the whole factor.
    factor = shortest(float(factors.max()))
    for context in _CONTEXTS:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": context,
        }
        values = {**config, "rope_scaling": scaling}
        made = rope_factors(Config(Path("config.json"), "LlamaForCausalLM", values))
        if made is not None and made.shape == factors.shape and np.allclose(made, factors, rtol=1e-6):
            return scaling
    raise UnsupportedError("rope_freqs.weight is none of Llama 3's known scalings: config.json has no words for it")
