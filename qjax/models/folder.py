"""A model as a folder that Hugging Face's, vLLM's and others' readers open: its weights' names there, and its files."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.arrays import QuantizedArray
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.affine_parts import plain_shapes
from qjax.formats.huggingface.card import Provenance, model_card
from qjax.formats.huggingface.config_write import config_of, generation_config_of
from qjax.formats.huggingface.json_files import read_object
from qjax.formats.huggingface.targets import target_named
from qjax.formats.huggingface.tokenizer_write import tokenizer_files
from qjax.formats.huggingface.weights import Heads, checkpoint_name, heads_of_rows
from qjax.formats.huggingface.writer import DTYPES, SHARD_BYTES, Weight, write_folder
from qjax.models.config import ModelConfig
from qjax.models.load import IGNORED_SUFFIXES, gguf_tensors

# Of the folder that a model came from; its weights, config and card are made anew.
_COPIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_COPIED += (
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
NOTHING_KNOWN = Provenance()


def save_folder(
    params: dict[str, Any],
    config: ModelConfig,
    metadata: Mapping[str, Any],
    source: Path,
    path: str | Path,
    format_name: str,
    *,
    provenance: Provenance = NOTHING_KNOWN,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write a model as a folder of safetensors, whole or not at all.

    Args:
      metadata: GGUF's. source: what the model came from: a folder's files are taken over, else they
        are made.
      path: the folder to make. format_name: a key of `TARGETS`. provenance: for the model card.
      shard_bytes, overwrite, progress: see `write_folder`.

    Raises:
      UnsupportedError: the format does not hold a weight, which is named, with the formats that do.
      QjaxError: see `write_folder`.
    """
    target = target_named(format_name)
    weights = list(checkpoint_weights(params, config))
    values, files = _taken_over(source) if (source / "config.json").is_file() else _made(params, metadata, weights)
    kind = values.get("dtype", values.get("torch_dtype"))
    dtype = kind if kind in DTYPES else "float16"
    values["tie_word_embeddings"] = "output" not in params
    kinds = {w.name: _words(w.array) for w in weights if w.array.ndim > 1}

    def all_files(quantization: dict[str, Any]) -> dict[str, bytes]:
        card = model_card(Path(path).name, target.name, kinds, provenance, metadata)
        found = {**files, "config.json": _json({**values, "quantization_config": quantization})}
        if quantization["quant_method"] == "gptq":
            # Where readers looked before config.json had it.
            found["quantize_config.json"] = _json(quantization)
        return {**found, "README.md": card.encode()}

    options: dict[str, Any] = {"shard_bytes": shard_bytes, "overwrite": overwrite, "progress": progress}
    return write_folder(path, target, weights, dtype, all_files, **options)


def checkpoint_weights(params: dict[str, Any], config: ModelConfig) -> Iterator[Weight]:
    """All weights by their names in a checkpoint, in its order.

    Raises:
      QjaxError: a weight that checkpoints have no name for.
    """
    heads = Heads(config.heads, config.kv_heads)
    for name, array in gguf_tensors(params, config):
        # Written in the config, or in the array itself.
        if name == "rope_freqs.weight" or name.endswith((".scale", *IGNORED_SUFFIXES)):
            continue
        theirs = checkpoint_name(name)
        if theirs is None:
            raise QjaxError(f"{name}: checkpoints have no name for it: save as gguf")
        yield Weight(theirs, array, heads_of_rows(config.arch, name, heads))


def _taken_over(source: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json and the other files of a folder."""
    values = read_object(source / "config.json")
    values.pop("quantization_config", None)
    try:
        files = {name: (source / name).read_bytes() for name in _COPIED if (source / name).is_file()}
    except OSError as error:
        raise QjaxError(f"{source}: its files cannot be read: {error}") from error
    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        warnings.warn(f"{source}: there is no tokenizer.json: the copy has none", QjaxWarning, stacklevel=4)
    return values, files


def _made(
    params: dict[str, Any], metadata: Mapping[str, Any], weights: list[Weight]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json and the other files, by GGUF's metadata."""
    floats = {str(w.array.dtype) for w in weights if not isinstance(w.array, QuantizedArray)}
    dtype = "bfloat16" if "bfloat16" in floats else "float16"
    factors = np.asarray(params["rope_factors"], np.float32) if "rope_factors" in params else None
    vocab = params["token_embd"].shape[0]
    values = config_of(metadata, {w.name for w in weights}, vocab, dtype, factors)
    return values, {**tokenizer_files(metadata), "generation_config.json": _json(generation_config_of(metadata))}


def _words(array: Any) -> str:
    return plain_shapes(array).describe() if isinstance(array, QuantizedArray) else str(array.dtype)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
