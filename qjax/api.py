"""The public face: load, generate, save, convert."""

import asyncio
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from qjax.arrays import Memory, QuantizedArray, memory
from qjax.calibrate import recipes
from qjax.calibrate.data import Calibration, calibration_tokens
from qjax.calibrate.driver import model_in, quantize_blocks
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.gguf import from_blocks
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.gguf.from_affine import blocks_of, type_for
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.plan import Wish, plan
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.huggingface.card import Provenance
from qjax.formats.huggingface.parts import Found
from qjax.formats.huggingface.writer import SHARD_BYTES
from qjax.formats.locate import locate
from qjax.formats.push import push_folder
from qjax.formats.source import Source, open_source
from qjax.generate import Piece, generate_many_ids, make_sampler, stream_text
from qjax.kernels import Activations, default_activations
from qjax.kernels.layout import lay_out as kernels_layout
from qjax.models import CacheKind, ModelConfig, load_gguf, rewrite
from qjax.models.exact import rounds_inputs, warn_unrounded
from qjax.models.folder import NOTHING_KNOWN, save_folder
from qjax.models.load import Make, Place, checked_config, gguf_tensors, keep
from qjax.pipeline import Executor, Placing, Plan, check_plan, one_stage, read_plan
from qjax.quantizers.ggml import Effort
from qjax.quantizers.ggml_legacy import check_finite
from qjax.text import Tokenizer, encode_chat

DEFAULT_TOKENS = 128
DEFAULT_ROWS = 8


class Text(NamedTuple):
    """What followed a prompt; stopped: an end-of-generation token ended it, which is not part of it."""

    text: str
    ids: list[int]
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Model:
    """An open model: packed params, what it is, and its tokenizer.

    Attributes:
      params, config: what `qjax.forward` takes.
      metadata, metadata_types: the file's, for saving.
      source: the file it came from.
      found: how each matrix that no ggml type holds was found, by its GGUF name; see `Found`.
      placing: the plan by which the params were put on several devices, if they were.
    """

    params: dict[str, Any] = dataclasses.field(repr=False)
    config: ModelConfig
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)
    metadata_types: Mapping[str, str] = dataclasses.field(repr=False)
    source: Path
    found: Mapping[str, Found] = dataclasses.field(default_factory=dict, repr=False)
    placing: Placing | None = dataclasses.field(default=None, repr=False)

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

    def executor(self, activations: Activations | None = None) -> Executor:
        """What runs the model where its weights are; `activations` as in `stream`."""
        if self.placing is not None:
            return self.placing.executor(self.params, activations)
        return one_stage(self.params, self.config, activations or default_activations())

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
        kv_cache: CacheKind | None = None,
        cache_dtype: Any = jnp.float16,
        activations: Activations | None = None,
    ) -> Iterator[Piece]:
        """Continue a prompt (text or token ids): pieces of text with the token ids they came from.

        Args:
          max_tokens: None for 128, or for as many as the context leaves if these are fewer.
          stop: a string, or several, before which the text ends.
          kv_cache: "int8" keeps keys and values in half the memory, with a scale for each head and token; "float" as
            floats of `cache_dtype`; None for what the plan says, if there is one, else "float".
          activations: see `qmatmul`; None for `qjax.kernels.default_activations()`.

        Raises:
          QjaxError: a sampling number out of range, an unknown kind of cache, or a prompt and answer longer than the
            context of the model or the plan.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        model = self.executor(activations)
        if max_tokens is None:
            # At least one, so that a prompt which leaves nothing is an error.
            max_tokens = max(min(DEFAULT_TOKENS, model.config.context - len(ids)), 1)
        sampler = make_sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        return stream_text(
            model,
            self.tokenizer,
            ids,
            max_tokens=max_tokens,
            sampler=sampler,
            seed=seed,
            stop=stop,
            cache_dtype=self._entries(kv_cache, cache_dtype),
        )

    def infer(
        self,
        tokens: Sequence[int],
        max_tokens: int = DEFAULT_TOKENS,
        temperature: float | int = 0.8,
        top_p: float | int = 1.0,
        **options: Any,
    ) -> list[int]:
        """The token ids that follow these, up to one that ends the text; `options` as in `stream`."""
        options |= {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return [piece.id for piece in self.stream(tokens, **options) if piece.id is not None]

    async def stream_async(self, prompt: str | Sequence[int], **options: Any) -> AsyncIterator[Piece]:
        """`stream` for an event loop: each step is waited for in a thread."""
        pieces = self.stream(prompt, **options)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        max_tokens: int = DEFAULT_TOKENS,
        rows: int | None = None,
        temperature: float | int = 0.8,
        top_k: int | None = None,
        top_p: float | int = 1.0,
        min_p: float | int = 0.0,
        repetition_penalty: float | int = 1.0,
        seed: int = 0,
        kv_cache: CacheKind | None = None,
        cache_dtype: Any = jnp.float16,
        activations: Activations | None = None,
        replicas: Sequence[Executor] = (),
    ) -> Iterator[Text]:
        """Continue many prompts, `rows` at a time; texts come in the order of the prompts, which may be without end.

        Args:
          rows: None for the plan's batch, if there is a plan, else 8.
          seed: prompt number i draws as it does alone with seed + i.
          replicas: executors of the same model on other devices, which share the prompts with this one.

        Raises:
          QjaxError: more rows than the plan has room for, or see `stream`; names the prompt's number.
        """
        most = None if self.placing is None else self.placing.plan.batch
        rows = (most or DEFAULT_ROWS) if rows is None else rows
        if most is not None and rows > most:
            raise QjaxError(f"expected at most {most} rows, the plan's batch, got {rows}: plan for a larger batch")
        sampler = make_sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        found = generate_many_ids(
            [self.executor(activations), *replicas],
            (self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts),
            max_tokens=max_tokens,
            ends=self.tokenizer.eog_ids,
            rows=rows,
            sampler=sampler,
            seed=seed,
            cache_dtype=self._entries(kv_cache, cache_dtype),
        )
        return (Text(self.tokenizer.decode(one.ids, continuing=True), one.ids, one.stopped) for one in found)

    def cache_kind(self, kv_cache: CacheKind | None) -> CacheKind:
        """What keys and values are kept as; None for what the plan says, if there is one, else "float".

        Raises:
          QjaxError: an unknown kind.
        """
        if kv_cache is None:
            kv_cache = "float" if self.placing is None else self.placing.plan.cache
        if kv_cache not in get_args(CacheKind):
            raise QjaxError(f"expected a kv_cache of {get_args(CacheKind)}, got {kv_cache!r}")
        return kv_cache

    def _entries(self, kv_cache: CacheKind | None, cache_dtype: Any) -> Any:
        """The dtype that an executor's cache is made with."""
        return jnp.int8 if self.cache_kind(kv_cache) == "int8" else cache_dtype

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
    kind = rewrite.plain_type(type_name)

    def make(name: str, w: Any) -> QuantizedArray | Any:
        check_finite(name, w)
        fitting = rewrite.whole_rows(name, w.shape, kind)
        return from_blocks(fitting, rewrite.encoded(fitting, np.asarray(w, np.float32)))

    return make


def _by_mix(file: Source, mix: str, imatrix: str | Path | None, effort: Effort) -> Make:
    """`make` that gives each matrix the type which a mix has for it, by its importance if there is one."""
    types = plan(file, Wish(mix, imatrix=imatrix is not None))
    floats = {name: i.shape for name, i in file.tensors.items() if i.type in FLOAT_TYPES and types[name] != i.type}
    for name in floats:
        rewrite.check_encodable(file.path, name, types[name])
    encoded = {name: shape for name, shape in floats.items() if types[name] not in FLOAT_TYPES}
    columns = {} if imatrix is None else read_imatrix(imatrix).matched(file.path, encoded)

    def make(name: str, w: Any) -> QuantizedArray | Any:
        check_finite(name, w)
        kind = types[name]
        return from_blocks(kind, rewrite.encoded(kind, np.asarray(w), columns.get(name), effort), np.asarray)

    return make


def _by_recipe(
    file: Source, recipe: recipes.Recipe, calibration: Calibration, **options: Any
) -> tuple[dict[str, Any], ModelConfig]:
    """Params quantized block by block, and the config."""
    rewrite.check_quantizable(file)
    schemes, model = recipe.schemes(file), model_in(file)
    tokens = None
    if recipe.method.needs_inputs:
        tokens = calibration_tokens(calibration, lambda: read_tokenizer(file.metadata, file.path), model.config)
    made = quantize_blocks(model, recipe.method, schemes, tokens, **options)
    return made.params, model.config


def _maker(
    quantize: str | Make | recipes.Recipe | None, imatrix: Any, effort: Effort, calibration: Any
) -> tuple[Make | recipes.Recipe | None, str | None]:
    """What makes each matrix, or else the mix that says so; None and None for as they are.

    Raises:
      QjaxError: an unknown type, or options that are for something else.
    """
    make, mix = (None, quantize) if isinstance(quantize, str) else (quantize, None)
    if mix is not None and not rewrite.names_mix(mix):
        make, mix = quantizer(mix), None
    if imatrix is not None and mix is None:
        raise QjaxError("imatrix is for a mix such as quantize='q4_k_m'")
    if effort != "normal" and mix is None:
        raise QjaxError("effort is for a mix such as quantize='q4_k_m'")
    if calibration is not None and not isinstance(make, recipes.Recipe):
        raise QjaxError("calibration is for a recipe such as quantize=qjax.GPTQ()")
    return make, mix


def _placing(known: Plan, file: Source, quantize: str | Make | recipes.Recipe | None) -> Placing:
    """The plan to be carried out, if the model has room by it: nothing is loaded to find out."""
    known = dataclasses.replace(known, type=quantize if isinstance(quantize, str) else None)
    if isinstance(quantize, recipes.Recipe):
        check_plan(known, file, packed=quantize.nbytes(file))
    elif quantize is None or isinstance(quantize, str):
        check_plan(known, file)
    else:
        text = (
            f"{file.path}: what a function makes is not known before: whether the plan has room for it is not checked"
        )
        warnings.warn(text, QjaxWarning, stacklevel=3)
    return Placing(known, checked_config(file), "output.weight" not in file.tensors)


def load(
    model: str | Path,
    *,
    quantize: str | Make | recipes.Recipe | None = None,
    imatrix: str | Path | None = None,
    effort: Effort = "normal",
    calibration: str | Path | np.ndarray | Calibration | None = None,
    place: Place = keep,
    plan: Plan | str | Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Model:
    """Open a model with its weights packed.

    Args:
      model: a GGUF file (any shard of a split one), a folder with one or with a Hugging Face model, "embedded" for the
        small model that comes with qjax, or a Hub id "owner/name[@revision][:file]".
      quantize: a plain type ("q4_0") for every float matrix, one of llama.cpp's mixes ("q4_k_m"), a recipe such as
        `qjax.GPTQ(bits=4, group_size=128)`, or a function `make(name, float32 [out, in])`; applied while loading: the
        whole float model is never in memory.
      imatrix: an importance matrix of llama-imatrix or `qjax calibrate`, for a mix.
      effort: of the encoders, for a mix: "high" makes better blocks of the same bytes, in several times the time.
      calibration: what a recipe looks at: a text file, "wikitext-2", token ids, or a `Calibration` with how much of it.
      place: `place(name, array) -> array` puts each array where it shall live.
      plan: which layers live on which devices, in place of `place`; a plan or its file, as `qjax plan -o` writes it.
        Float matrices get the plan's type unless `quantize` says another; the plan's context, batch and cache hold for
        the model. Where JAX runs in several processes each loads the stage of its number.
      progress: told each tensor's name, or of a recipe each block's number, once it is loaded.

    Raises:
      QjaxError: the file cannot be found, read or understood; the message says what to do.
    """
    make, mix, known = None, None, None
    if plan is None or quantize is not None:
        # What does not go together is said before anything is fetched.
        make, mix = _maker(quantize, imatrix, effort, calibration)
    path = locate(model)
    file = open_source(path)
    if plan is not None:
        known = plan if isinstance(plan, Plan) else read_plan(plan, checked_config(file).layers)
        if quantize is None:
            quantize = known.type
            make, mix = _maker(quantize, imatrix, effort, calibration)
    placing, lay_out, wanted = None, kernels_layout, lambda name: True
    if known is not None:
        placing = _placing(known, file, quantize)
        lay_out, place, wanted = placing.lay_out, placing.place, placing.wanted
    if isinstance(make, recipes.Recipe):
        given = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        step = lambda done, total, note: progress(f"block {done} of {total}")
        params, config = _by_recipe(file, make, given, lay_out=lay_out, place=place, progress=step)
        return Model(params, config, file.metadata, file.metadata_types, path, placing=placing)
    if mix is not None:
        make = _by_mix(file, mix, imatrix, effort)
    if make is not None:
        rewrite.check_quantizable(file)
    params, config = load_gguf(file, make=make, lay_out=lay_out, place=place, wanted=wanted, progress=progress)
    return Model(params, config, file.metadata, file.metadata_types, path, dict(file.found), placing)


def _named(name: str, f: Callable[[Any], Any], array: Any) -> Any:
    """`f` of an array, with its name in what it refuses."""
    try:
        return f(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error


def save(
    model: Model,
    path: str | Path,
    format: str = "gguf",
    *,
    provenance: Provenance = NOTHING_KNOWN,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write a model, whole or not at all; packed weights go to the bytes they came from.

    That activations are rounded a GGUF file cannot say: it is left out, with a warning.

    Args:
      path: a file for "gguf", else a folder to be made.
      format: "gguf"; "gptq", "gptq_v2", "awq" or "compressed-tensors", which vLLM, transformers and others read; or
        "qjax", which holds any packed weight and is read by qjax alone.
      provenance: how the model came to be, for the model card of a folder.
      max_shard_bytes: of weights in each file of a folder. overwrite: a folder with files in it.
      progress: told each weight's name once it is written, in a folder.

    Raises:
      UnsupportedError: a weight that the format does not hold without loss; names it, and formats that do.
      QjaxError: `format` is none of these, there is something at `path`, or the disk refuses.
    """
    if format != "gguf":
        options: dict[str, Any] = {"provenance": provenance, "shard_bytes": max_shard_bytes, "overwrite": overwrite}
        facts = (model.params, model.config, model.metadata, model.source)
        return save_folder(*facts, path, format, **options, progress=progress)
    tensors, rounded = [], []
    for name, array in gguf_tensors(model.params, model.config):
        if rounds_inputs(array):
            rounded.append(name)
        make = functools.partial(_named, name, blocks_of, array)
        tensors.append(TensorToWrite(name, array.shape, _named(name, type_for, array), make))
    warn_unrounded(Path(path), rounded)
    metadata = rewrite.with_file_type(model.metadata, {t.name: (t.type, t.shape) for t in tensors})
    write_gguf(path, metadata, tensors, metadata_types=model.metadata_types)
    return Path(path)


def push_to_hub(
    model: Model | str | Path,
    repo_id: str,
    format: str = "gguf",
    *,
    private: bool = False,
    message: str | None = None,
    **options: Any,
) -> str:
    """Upload a model to the Hugging Face Hub, by the token in HF_TOKEN or of `hf auth login`; returns where it is.

    Args:
      model: a folder or file that `save` wrote, or a model, which is saved in `format` first; `options` are `save`'s.
      repo_id: "owner/name"; made if there is none, `private` or not. message: of the commit.

    Raises:
      QjaxError: see `save` and `push_folder`.
    """
    if not isinstance(model, Model):
        return push_folder(model, repo_id, private=private, message=message)
    with tempfile.TemporaryDirectory() as folder:
        name = repo_id.rpartition("/")[2].partition("@")[0] or "model"
        path = save(model, Path(folder) / (f"{name}.gguf" if format == "gguf" else name), format, **options)
        return push_folder(path, repo_id, private=private, message=message)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    quantize: str | None = None,
    split_max_bytes: int | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] = lambda name: None,
    resumed: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a GGUF file or a Hugging Face folder as one GGUF file or its shards: as it is, or quantized.

    One tensor is in memory at a time. `progress` is told each tensor's name once its bytes are made, or found: what a
    killed run of the same has done is not done again.

    Args:
      source: see `load`.
      quantize: a plain type ("q8_0") for every float matrix, or one of llama.cpp's mixes ("q4_k_m").
      split_max_bytes, fresh, resumed: see `qjax.models.rewrite.Output`.

    Returns:
      The file, or the first shard.

    Raises:
      QjaxError: the source cannot be read, is quantized already, or there is no encoder for `quantize`.
    """
    opened = open_source(locate(source))
    output = rewrite.Output(split_max_bytes, fresh, resumed)
    if quantize is not None and rewrite.names_mix(quantize):
        files, _ = rewrite.convert_to_mix(opened, target, Wish(quantize), output=output, progress=progress)
    else:
        files = rewrite.convert(opened, target, quantize=quantize, output=output, progress=progress)
    return files[0]
