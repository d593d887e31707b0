"""From a source to params, tensor by tensor: never more than one tensor beside the packed model."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qjax.arrays import Partitioned, QuantizedArray, RawBlockArray
from qjax.errors import FormatError, QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.gguf.arrays import FLOAT_TYPES, READABLE_TYPES
from qjax.formats.source import Source
from qjax.models.config import ModelConfig, config_from_gguf

Make = Callable[[str, Any], Any]
Place = Callable[[str, Any], Any]
LayOut = Callable[[str, Any], Any]

# Name in the file -> where it goes; of a layer's tensors the part after "blk.N.".
TOP = {"token_embd.weight": "token_embd", "output.weight": "output", "output_norm.weight": "output_norm"}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")
QK_NORMS = ("attn_q_norm", "attn_k_norm")
# Derived at load, or of no use to a float computation.
IGNORED_SUFFIXES = (".attn_rot_embd", ".rope_freqs.weight", ".attn_rot_embd.weight", ".input_scale")


def layer_weights(config: ModelConfig) -> tuple[str, ...]:
    """What every layer has one `.weight` of."""
    return (*MATRICES, *NORMS, *(QK_NORMS if config.qk_norm else ()))


def layer_tensor(i: int, key: str) -> str:
    """The name in a file of what `models.forward.layer` calls `key` in layer i."""
    return f"blk.{i}.{key.removesuffix('_bias')}.bias" if key.endswith("_bias") else f"blk.{i}.{key}.weight"


def layer_tensors(file: Source, config: ModelConfig, i: int) -> dict[str, str]:
    """The name in the file of each weight of layer i."""
    keys = (*layer_weights(config), *(f"{name}_bias" for name in MATRICES))
    names = {key: layer_tensor(i, key) for key in keys}
    return {key: name for key, name in names.items() if not key.endswith("_bias") or name in file.tensors}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that may be in a file, by its GGUF name."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, ffn = config.hidden, config.ffn
    rows = {
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab, hidden),
        "output.weight": (config.vocab, hidden),
        "output_norm.weight": (hidden,),
        "rope_freqs.weight": (config.rope_dim // 2,),
    }
    for i in range(config.layers):
        for name, shape in rows.items():
            shapes[f"blk.{i}.{name}.weight"] = shape
            shapes[f"blk.{i}.{name}.bias"] = shape[:1]
        for name in NORMS:
            shapes[f"blk.{i}.{name}.weight"] = (hidden,)
        for name in QK_NORMS if config.qk_norm else ():
            shapes[f"blk.{i}.{name}.weight"] = (config.head_dim,)
    return shapes


def read_config(file: Source, vocab: int) -> ModelConfig:
    """`config_from_gguf`, with the file named in its errors."""
    try:
        return config_from_gguf(file.metadata, vocab)
    except QjaxError as error:
        raise type(error)(f"{file.path}: {error}") from error


def checked_config(file: Source) -> ModelConfig:
    """The config of a model whose tensors are all there, with the shapes that it says.

    Raises:
      UnsupportedError, FormatError: see `config_from_gguf` and `check_tensors`.
    """
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        read_config(file, 1)
        raise FormatError(f"{file.path}: tensor 'token_embd.weight' is missing; this file holds no weights")
    config = read_config(file, embedding.shape[0] if embedding.shape else 1)
    check_tensors(file, config)
    return config


def check_tensors(file: Source, config: ModelConfig) -> None:
    """Every tensor that the model needs is there with its shape, and none that it would not use.

    Raises:
      FormatError: a tensor is missing or has another shape, or a vector is quantized.
      UnsupportedError: a type that is not known, or tensors of a variant that is not: leaving them out would compute
        something else.
    """
    in_layers = (f"blk.{i}.{name}.weight" for i in range(config.layers) for name in layer_weights(config))
    # One name at a time: the number of layers is only what the header claims.
    for name in itertools.chain(["token_embd.weight", "output_norm.weight"], in_layers):
        if name not in file.tensors:
            raise FormatError(f"{file.path}: tensor {name!r} is missing; the file is incomplete")
    shapes = expected_shapes(config)
    for name, info in file.tensors.items():
        if info.type not in READABLE_TYPES and name not in file.found:
            known = ", ".join(sorted(READABLE_TYPES))
            raise UnsupportedError(f"{file.path}: tensor {name!r} has type {info.type}; known are {known}")
        if len(info.shape) < 2 and info.type not in FLOAT_TYPES:
            raise FormatError(f"{file.path}: tensor {name!r} is a vector of {info.type}, expected floats")
        if name in shapes:
            if info.shape != shapes[name]:
                raise FormatError(
                    f"{file.path}: tensor {name!r} is {info.shape}, expected {shapes[name]} from the metadata"
                )
        elif name.endswith(".scale") and name.removesuffix(".scale") + ".weight" in shapes:
            weight = file.tensors.get(name.removesuffix(".scale") + ".weight")
            if weight is None or weight.type != "NVFP4" or info.shape not in ((1,), ()):
                raise UnsupportedError(f"{file.path}: tensor {name!r} {info.shape} scales no NVFP4 weight")
        elif not name.endswith(IGNORED_SUFFIXES):
            raise UnsupportedError(
                f"{file.path}: tensor {name!r} is not part of a {config.arch} model as qjax knows it"
            )


def read_array(file: Source, name: str, *, apply_scale: bool = True) -> Any:
    """One tensor as a packed or float array, with the `.scale` tensor of an NVFP4 weight applied unless unwanted.

    Its leaves are numpy's and may be views on the file: `file.release(name)` is for when they are done with.
    """
    array = file.array(name)
    scale = name.removesuffix(".weight") + ".scale"
    if isinstance(array, RawBlockArray) and array.type == "NVFP4" and apply_scale and scale in file.tensors:
        factor = np.ascontiguousarray(file.raw(scale)).view(FLOAT_TYPES[file.tensors[scale].type])
        rows = np.full((*array.shape[:-1], 1), factor.reshape(-1)[0], np.float32)
        array = array.replace(tensor_scale=rows)  # pyright: ignore[reportAttributeAccessIssue]
    return array


def inverse_frequencies(config: ModelConfig, factors: np.ndarray | None) -> np.ndarray:
    """float32 [rope_dim / 2]: theta**(-2i/dim), divided by the file's factors (Llama 3's scaling) if any."""
    exponent = np.arange(0, config.rope_dim, 2, dtype=np.float32) / config.rope_dim
    frequencies = 1.0 / (np.float32(config.rope_theta) ** exponent) / np.float32(config.rope_factor)
    return (frequencies if factors is None else frequencies / factors).astype(np.float32)


def gguf_tensors(params: dict[str, Any], config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """(name in the file, array) of each tensor of a model: what `load_gguf` read, with NVFP4's `.scale` set apart."""

    def split(name: str, array: Any) -> Iterator[tuple[str, Any]]:
        array = array.weight if isinstance(array, Partitioned) else array
        yield name, array
        if isinstance(array, RawBlockArray) and array.tensor_scale is not None:
            yield name.removesuffix(".weight") + ".scale", np.asarray(array.tensor_scale).reshape(-1)[:1]

    if "rope_factors" in params:
        yield "rope_freqs.weight", params["rope_factors"]
    for name, key in TOP.items():
        if key in params:
            yield from split(name, params[key])
    for i, p in enumerate(params["layers"]):
        for key, array in p.items():
            yield from split(layer_tensor(i, key), array)


def keep(_: str, array: Any) -> Any:
    """The `place` and the `lay_out` that leave an array as it is."""
    return array


def placed(place: Place, name: str, array: Any) -> Any:
    """What `place` makes of an array; what it leaves in numpy goes to JAX's default device."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), place(name, array))


def warn_kept(name: str, kind: str) -> None:
    """Say that a packed tensor is not quantized anew."""
    warnings.warn(f"{name} is {kind} already and stays so: quantize from a float file", QjaxWarning, stacklevel=3)


def load_gguf(
    file: Source,
    *,
    make: Make | None = None,
    lay_out: LayOut = keep,
    place: Place = keep,
    wanted: Callable[[str], bool] = lambda name: True,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Any], ModelConfig]:
    """Params and config of an open GGUF file or Hugging Face folder.

    Args:
      make: `make(name, float32 [out, in]) -> array`, asked for each float matrix: in-situ quantization.
      lay_out: `lay_out(name, array) -> array`, asked for each matrix that is multiplied with, made ones included: the
        array in the memory layout that kernels want. Its leaves are numpy's, or JAX arrays after `make`; both may
        come back.
      place: `place(name, array) -> array`: puts an array, whose leaves may be numpy's, where it shall live.
      wanted: `wanted(name)` tells which tensors are read; the others are None in the params.
      progress: told each tensor's name once it is loaded.

    Raises:
      UnsupportedError, FormatError: see `config_from_gguf` and `check_tensors`.
    """
    config = checked_config(file)

    def get(name: str) -> Any:
        if not wanted(name):
            return None
        array = read_array(file, name)
        if make is not None and not isinstance(array, QuantizedArray) and array.ndim == 2:
            floats = np.asarray(array, np.float32)
            # What the file holds of it is not needed beside its floats, nor these beside what is made of them.
            del array
            file.release(name)
            array = make(name, floats)
            del floats
        elif make is not None and isinstance(array, QuantizedArray):
            warn_kept(name, file.tensors[name].type)
        # Of an embedding only rows are looked up, unless it is the output's matrix too.
        if array.ndim == 2 and (name != "token_embd.weight" or "output.weight" not in file.tensors):
            array = lay_out(name, array)
        array = placed(place, name, array)
        file.release(name)
        progress(name)
        return array

    params = read_ends(file, config, get)
    params["rope"] = placed(place, "rope", params["rope"])
    params["layers"] = [
        {key: get(name) for key, name in layer_tensors(file, config, i).items()} for i in range(config.layers)
    ]
    return params, config


def read_ends(file: Source, config: ModelConfig, get: Callable[[str], Any]) -> dict[str, Any]:
    """The params outside of the layers: what `get` gives for each tensor's name, and "rope" on the host.

    Raises:
      FormatError: factors of the rotary frequencies that are not positive.
    """
    params = {key: get(name) for name, key in TOP.items() if name in file.tensors}
    factors = None
    if "rope_freqs.weight" in file.tensors:
        factors = np.asarray(read_array(file, "rope_freqs.weight"), np.float32)
        if not (factors > 0).all():
            raise FormatError(f"{file.path}: tensor 'rope_freqs.weight' has numbers that are not positive")
        params["rope_factors"] = factors
    params["rope"] = inverse_frequencies(config, factors)
    return params
