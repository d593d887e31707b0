"""config.json and its neighbours as GGUF's metadata: the keys, values and types that llama.cpp's converter writes.

Sources: `set_gguf_parameters` and `generate_extra_tensors` of conversion/base.py and conversion/llama.py in llama.cpp.
gguf's own package knows the names and types of keys, and what a model card and a folder's name say.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float32

from qjax.errors import FormatError, QjaxWarning, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.gguf.metadata import VALUE_TYPES
from qjax.formats.huggingface.config import Config
from qjax.formats.huggingface.vocabulary import add_vocabulary

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}
_TYPE_NAMES = {gguf.GGUFValueType.FLOAT32: "f32", gguf.GGUFValueType.FLOAT64: "f64", gguf.GGUFValueType.STRING: "str"}
_TYPE_NAMES |= {gguf.GGUFValueType.BOOL: "bool"}


def read_metadata(
    folder: Path, config: Config, parameters: int, float_type: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Metadata of the file that the folder is seen as, and the types of its values.

    Args:
        parameters: number of weights in all. float_type: of most of them.

    Raises:
        FormatError: a file of the folder is damaged, or a number in it makes no sense.
        UnsupportedError: a variant of the architecture, or a tokenizer, that is not known.
    """
    writer = gguf.GGUFWriter(None, config.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    _add_card(writer, folder, parameters)
    _add_sizes(writer, config)
    writer.add_file_type(FILE_TYPES[float_type])
    if config.arch == "llama":
        writer.add_vocab_size(config.count("vocab_size"))
        writer.add_rope_dimension_count(config.head_dim)
    _add_window(writer, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, folder, config.arch, config.count("vocab_size"))
    return _collected(writer)


def _add_card(writer: gguf.GGUFWriter, folder: Path, parameters: int) -> None:
    """Name, author, license and the like: by README.md, generation_config.json and the folder's name."""
    try:
        place = folder.resolve()
        # In the Hub's cache a folder is named after its commit, and two above it is models--OWNER--NAME.
        cached = place.parent.name == "snapshots"
        name = place.parent.parent.name.rpartition("--")[2] if cached else None
        card = gguf.Metadata.load(None, place, name, parameters)
        card.name = card.name or place.name
        card.finetune = None if card.finetune == place.name else card.finetune
        card.size_label = card.size_label or gguf.size_label(parameters, parameters, 0, 0)
        card.set_gguf_meta_model(writer)
    # A card is written by hand: broken ones make the package raise whatever Python raises.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{folder}: README.md or generation_config.json is damaged: {reason}") from error


def _add_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_block_count(config.count("num_hidden_layers"))
    writer.add_context_length(config.count("max_position_embeddings"))
    writer.add_embedding_length(config.count("hidden_size"))
    writer.add_feed_forward_length(config.count("intermediate_size"))
    writer.add_head_count(config.count("num_attention_heads"))
    writer.add_head_count_kv(config.count("num_key_value_heads", config.count("num_attention_heads")))
    _add_rope(writer, config)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6))
    if config.arch == "llama" or config.get("head_dim") is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _add_rope(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = config.rope
    kind = str(rope["rope_type"]).lower()
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.number("factor", 1.0, rope))
    elif kind != "default" and not (kind == "llama3" and config.arch == "llama"):
        known = "default, linear, and for Llama llama3"
        raise UnsupportedError(
            f"{config.path}: rope_type {shown(kind)} of {config.arch} is not known; known are {known}"
        )
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{config.path}: partial_rotary_factor is not known; known is 1")
    writer.add_rope_freq_base(config.number("rope_theta", 10000.0, rope))


def _add_window(writer: gguf.GGUFWriter, config: Config) -> None:
    """How far tokens look back; llama.cpp's converter leaves it out, and llama.cpp then looks back without limit."""
    mistral = config.architecture == "MistralForCausalLM"
    if config.get("sliding_window") is None or not (mistral or config.get("use_sliding_window", False)):
        return
    window, layers = config.count("sliding_window"), config.count("num_hidden_layers")
    unlimited = 0 if mistral else config.get("max_window_layers", 0)
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        unlimited = sum(kind != "sliding_attention" for kind in kinds)
    if type(unlimited) is not int or unlimited < 0:
        raise FormatError(f"{config.path}: max_window_layers is {unlimited!r:.40}, expected a number of layers")
    if unlimited == 0:
        writer.add_sliding_window(window)
    elif unlimited < layers:
        warnings.warn(
            f"{config.path}: only some of its layers look back no further than {window} tokens, which GGUF cannot say "
            f"of {config.arch}: here all look back without limit, so texts that are longer give other numbers",
            QjaxWarning,
            stacklevel=2,
        )


def rope_factors(config: Config) -> Float32[np.ndarray, " half"] | None:
    """Llama 3's scaling as what each frequency is divided by, `rope_freqs.weight`; None for models without.

    Long waves (few turns over the context that the model was first trained on) are scaled by the whole factor, short
    ones not at all, those between smoothly.

    Raises:
        FormatError: a parameter that makes no sense.
    """
    rope = config.rope
    if str(rope["rope_type"]).lower() != "llama3":
        return None
    dim, theta = config.head_dim, config.number("rope_theta", 10000.0, rope)
    factor, context = (
        config.number("factor", 8.0, rope),
        config.number("original_max_position_embeddings", 8192.0, rope),
    )
    low, high = config.number("low_freq_factor", 1.0, rope), config.number("high_freq_factor", 4.0, rope)
    if low >= high:
        raise FormatError(f"{config.path}: low_freq_factor {low} is not below high_freq_factor {high}")
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    turns = context * (1.0 / np.float32(theta) ** exponent).astype(np.float32) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _collected(writer: gguf.GGUFWriter) -> tuple[dict[str, Any], dict[str, str]]:
    """What was added, as `GGUFFile` gives it: numbers rounded to their types, arrays as numpy's or list[str]."""
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for key, entry in writer.kv_data[0].items():
        is_array = entry.type == gguf.GGUFValueType.ARRAY
        kind = entry.sub_type or gguf.GGUFValueType.get_type(entry.value[0]) if is_array else entry.type
        name = _TYPE_NAMES.get(kind) or kind.name.lower().replace("uint", "u").replace("int", "i")
        dtype = VALUE_TYPES[name].dtype if name != "str" else None
        if is_array:
            types[key] = f"arr[{name}]"
            metadata[key] = list(entry.value) if dtype is None else np.asarray(entry.value, dtype)
        else:
            types[key] = name
            metadata[key] = np.asarray(entry.value, dtype).item() if name in ("f32", "f64") else entry.value
    return metadata, types
