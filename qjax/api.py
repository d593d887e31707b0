"""The public face: load, generate, save, convert."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.arrays import Memory, QuantizedArray, memory
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.gguf import GGUFFile, from_blocks, open_gguf, to_blocks, type_of
from qjax.formats.gguf.arrays import FLOAT_TYPES, READABLE_TYPES
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.mixes import is_mix
from qjax.formats.gguf.plan import Wish, plan
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.locate import locate
from qjax.generate import Piece, make_sampler, stream_text
from qjax.kernels import Activations, default_activations
from qjax.kernels.layout import lay_out
from qjax.models import ModelConfig, load_gguf
from qjax.models.load import Make, Place, gguf_tensors, keep, read_array, warn_kept
from qjax.quantizers.ggml import TYPES as ENCODED
from qjax.quantizers.ggml import encode
from qjax.quantizers.ggml_legacy import check_finite
from qjax.text import Tokenizer, encode_chat

# What `quantize=` and `convert --type` take, with llama.cpp's general.file_type for each.
QUANTIZE_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "bf16": 32,
}

DEFAULT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Model:
    """An open model: packed params, what it is, and its tokenizer.

    Attributes:
      params, config: what `qjax.forward` takes.
      metadata, metadata_types: the file's, for saving.
      source: the file it came from.
    """

    params: dict[str, Any] = dataclasses.field(repr=False)
    config: ModelConfig
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)
    metadata_types: Mapping[str, str] = dataclasses.field(repr=False)
    source: Path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Made on first use: a model without a (known) tokenizer can still be run on ids."""
        return read_tokenizer(self.metadata, self.source)

    @property
    def memory(self) -> Memory:
        """Bytes of all weights, packed and as 16-bit floats."""
        return memory({key: value for key, value in self.params.items() if not key.startswith("rope")})

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of a prompt, with BOS in front where the model adds one."""
        return self.tokenizer.encode(text, add_bos=self.tokenizer.add_bos, parse_special=parse_special)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_TOKENS,
        temperature: float | int = 0.8,
        top_k: int | None = None,
        top_p: float | int = 1.0,
        min_p: float | int = 0.0,
        repetition_penalty: float | int = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        cache_dtype: Any = jnp.float16,
        activations: Activations | None = None,
    ) -> Iterator[Piece]:
        """Continue a prompt (text or token ids): pieces of text with the token ids they came from.

        Args:
          max_tokens: None for 128, or for as many as the context leaves if these are fewer.
          stop: a string, or several, before which the text ends.
          activations: see `qmatmul`; None for `qjax.kernels.default_activations()`.

        Raises:
          QjaxError: a sampling number out of range, or a prompt and answer longer than the model's context.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if max_tokens is None:
            # At least one, so that a prompt which leaves nothing is an error.
            max_tokens = max(min(DEFAULT_TOKENS, self.config.context - len(ids)), 1)
        sampler = make_sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        return stream_text(
            self.params,
            self.config,
            self.tokenizer,
            ids,
            max_tokens=max_tokens,
            sampler=sampler,
            seed=seed,
            stop=stop,
            cache_dtype=cache_dtype,
            activations=activations or default_activations(),
        )

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """The text of `stream`, piece by piece; the same options."""
        return (piece.text for piece in self.stream(prompt, **options) if piece.text)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[str]:
        """Answer a conversation of {"role", "content"} messages by the model's own chat template."""
        return self.generate(encode_chat(self.tokenizer, messages), **options)


def read_tokenizer(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """The tokenizer of a file's metadata.

    Raises:
      FormatError, UnsupportedError: see `Tokenizer.from_gguf`; the message names the file.
    """
    try:
        return Tokenizer.from_gguf(metadata)
    except QjaxError as error:
        raise type(error)(f"{source}: {error}") from error


def quantizer(type_name: str) -> Make:
    """`make(name, float32 [out, in])` for `load`: round-to-nearest by ggml's encoder of that type.

    A matrix whose rows do not hold whole blocks stays float16, with a warning that names it.

    Raises:
      QjaxError: a type without an encoder; lists those that have one.
    """
    kind = _known_type(type_name)

    def make(name: str, w: Any) -> QuantizedArray | Any:
        check_finite(name, w)
        fitting = _target_type(name, w.shape, kind)
        return from_blocks(fitting, np.asarray(_encoded(fitting, w)))

    return make


def _known_type(type_name: str) -> str:
    """ggml's name of a plain type that there is an encoder for."""
    if type_name.lower() not in QUANTIZE_TYPES:
        raise QjaxError(
            f"cannot quantize to {type_name!r}; known are {', '.join(QUANTIZE_TYPES)}, and llama.cpp's mixes such as "
            "q4_k_m for `load` and `qjax quantize`"
        )
    return type_name.upper()


def check_encodable(path: Path, name: str, kind: str) -> None:
    """UnsupportedError naming the tensor if there is no encoder of its type."""
    if kind != "F32" and kind not in ENCODED:
        raise UnsupportedError(
            f"{path}: {name} would become {kind}, which qjax does not make yet; known are {', '.join(ENCODED)}"
        )


def _by_mix(file: GGUFFile, mix: str, imatrix: str | Path | None) -> Make:
    """`make` that gives each matrix the type which a mix has for it, by its importance if there is one."""
    types = plan(file, Wish(mix, imatrix=imatrix is not None))
    floats = {name: i.shape for name, i in file.tensors.items() if i.type in FLOAT_TYPES and types[name] != i.type}
    for name in floats:
        check_encodable(file.path, name, types[name])
    encoded = {name: shape for name, shape in floats.items() if types[name] not in FLOAT_TYPES}
    columns = {} if imatrix is None else read_imatrix(imatrix).matched(file.path, encoded)

    def make(name: str, w: Any) -> QuantizedArray | Any:
        check_finite(name, w)
        kind = types[name]
        return from_blocks(kind, encode(kind, np.asarray(w), columns.get(name)), np.asarray)

    return make


def _check_quantizable(file: GGUFFile) -> None:
    if not any(info.type in FLOAT_TYPES and len(info.shape) == 2 for info in file.tensors.values()):
        raise QjaxError(f"{file.path}: every matrix is quantized already; quantize from a float file")


def load(
    model: str | Path,
    *,
    quantize: str | Make | None = None,
    imatrix: str | Path | None = None,
    place: Place = keep,
    progress: Callable[[str], None] = lambda name: None,
) -> Model:
    """Open a model with its weights packed.

    Args:
      model: a GGUF file (any shard of a split one), a folder with one, "embedded" for the small model that comes
        with qjax, or a Hub id "owner/name" or "owner/name:file".
      quantize: a plain type ("q4_0") for every float matrix, one of llama.cpp's mixes ("q4_k_m"), or a function
        `make(name, float32 [out, in])`; applied while loading: the whole float model is never in memory.
      imatrix: an importance matrix of llama-imatrix, for a mix.
      place: `place(name, array) -> array` puts each array where it shall live.
      progress: told each tensor's name once it is loaded.

    Raises:
      QjaxError: the file cannot be found, read or understood; the message says what to do.
    """
    make, mix = (None, quantize) if isinstance(quantize, str) else (quantize, None)
    if mix is not None and (mix.lower() in QUANTIZE_TYPES or not is_mix(mix)):
        make, mix = quantizer(mix), None
    if imatrix is not None and mix is None:
        raise QjaxError("imatrix is for a mix such as quantize='q4_k_m'")
    path = locate(model)
    file = open_gguf(path)
    if mix is not None:
        make = _by_mix(file, mix, imatrix)
    if make is not None:
        _check_quantizable(file)
    params, config = load_gguf(file, make=make, lay_out=lay_out, place=place, progress=progress)
    return Model(params, config, file.metadata, file.metadata_types, path)


def save(model: Model, path: str | Path) -> Path:
    """Write a model as GGUF, atomically; packed weights go to the bytes they came from.

    Raises:
      UnsupportedError: a weight that no GGUF type holds without loss.
    """
    tensors, types = [], []
    for name, array in gguf_tensors(model.params, model.config):
        types.append(type_of(array))
        tensors.append(TensorToWrite(name, array.shape, types[-1], functools.partial(to_blocks, array)))
    metadata = dict(model.metadata)
    _set_file_type(metadata, types, [tensor.shape for tensor in tensors])
    write_gguf(path, metadata, tensors, metadata_types=model.metadata_types)
    return Path(path)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    quantize: str | None = None,
    split_max_bytes: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Rewrite a GGUF file, tensor by tensor through packed arrays: the same bytes, or float matrices quantized.

    One tensor is in memory at a time. A split source becomes one file, or shards by `split_max_bytes` (see
    `write_gguf`), the first of which is returned. `progress` is told each tensor's name once its bytes are made.

    Raises:
      QjaxError: the source cannot be read, or `quantize` names no type with an encoder.
    """
    path = locate(source)
    file = open_gguf(path)
    kind_wanted = None if quantize is None else _known_type(quantize)
    if kind_wanted is not None:
        _check_quantizable(file)

    def rewritten(name: str, kind: str) -> np.ndarray:
        array = read_array(file, name, apply_scale=False)
        if kind == file.tensors[name].type:
            data = to_blocks(array)
        else:
            w = np.asarray(array, np.float32)
            check_finite(name, w)
            data = np.asarray(_encoded(kind, w))
        file.release(name)
        return data

    def made(name: str, kind: str, kept: bool) -> np.ndarray:
        data = file.raw(name) if kept else rewritten(name, kind)
        progress(name)
        return data

    tensors, types = [], []
    for name, info in file.tensors.items():
        kind = info.type
        if kind_wanted is not None and len(info.shape) == 2:
            if kind in FLOAT_TYPES:
                kind = _target_type(name, info.shape, kind_wanted)
            else:
                warn_kept(name, kind)
        types.append(kind)
        # In memory float64 becomes float32.
        kept = kind == info.type and kind in ("F64", *(GGML_TYPES.keys() - READABLE_TYPES))
        tensors.append(TensorToWrite(name, info.shape, kind, functools.partial(made, name, kind, kept)))
    metadata = dict(file.metadata)
    if quantize is not None:
        _set_file_type(metadata, types, [tensor.shape for tensor in tensors])
    types_kept = file.metadata_types
    return write_gguf(target, metadata, tensors, metadata_types=types_kept, split_max_bytes=split_max_bytes)[0]


def _encoded(kind: str, w: Any) -> Any:
    """Bytes of float32 [out, in] in a type of QUANTIZE_TYPES."""
    return np.asarray(w, np.float32).view(np.uint8) if kind == "F32" else encode(kind, np.asarray(w))


def _target_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    if shape[-1] % GGML_TYPES[kind].block_size == 0:
        return kind
    block = GGML_TYPES[kind].block_size
    warnings.warn(
        f"{name}: rows of {shape[-1]} are not whole {kind} blocks of {block}; kept as F16", QjaxWarning, stacklevel=3
    )
    return "F16"


def _set_file_type(metadata: dict[str, Any], types: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """`general.file_type` says what most weights are, where llama.cpp has a number for that."""
    weights: dict[str, int] = {}
    for kind, shape in zip(types, shapes, strict=True):
        weights[kind] = weights.get(kind, 0) + int(np.prod(shape, dtype=np.int64))
    most = max(weights, key=lambda kind: weights[kind], default="").lower()
    if most in QUANTIZE_TYPES:
        metadata["general.file_type"] = QUANTIZE_TYPES[most]
        if most.startswith("q"):
            metadata["general.quantization_version"] = 2
