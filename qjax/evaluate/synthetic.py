"""Made-up weights, made packed: what a model of some size costs in memory and time, without its weights.

Every byte is random, so that every page is touched and nothing compresses or repeats; then the blocks' float scales
get a fixed sign and exponent, which keeps them finite and the weights near the size of trained ones, 1/sqrt(in).
Nothing is ever encoded from floats. Names seed the generator: a name gives the same bytes everywhere.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from qjax.errors import QjaxError, UnsupportedError
from qjax.evaluate.shapes import Shape, metadata
from qjax.formats.gguf import from_blocks
from qjax.formats.gguf.places import Traits
from qjax.formats.gguf.plan import Wish, types_of
from qjax.formats.gguf.types import type_of_name
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.kernels import lay_out
from qjax.models import ModelConfig
from qjax.models.load import MATRICES, NORMS, TOP, Place, expected_shapes, inverse_frequencies, keep, placed
from qjax.pipeline.local import available_memory


class FloatFormat(NamedTuple):
    """A small float: the numpy type of its bits, the bias of its exponent, its mantissa bits; the sign is on top."""

    bits: Any
    bias: int
    mantissa: int


F32 = FloatFormat(np.uint32, 127, 23)
BF16 = FloatFormat(np.uint16, 127, 7)
F16 = FloatFormat(np.uint16, 15, 10)
# Both as ggml reads them, at half their value beside a doubled table of codes.
UE4M3 = FloatFormat(np.uint8, 8, 3)
E8M0 = FloatFormat(np.uint8, 128, 0)


class Scale(NamedTuple):
    """A float at byte `at` of each block, 2**shift times as large as the block's first one."""

    at: int
    shift: int = 0
    negative: bool = False
    format: FloatFormat = F16


class Codes(NamedTuple):
    """A block type: how far its weights spread (standard deviation) where each scale is 1, and its scales."""

    spread: float
    scales: tuple[Scale, ...]


def _at(offset: int, spread: float) -> Codes:
    return Codes(spread, (Scale(offset),))


# Minimums are as large as the mean of scale * code, so that weights lie around zero. Offsets are those of
# ggml-common.h's structs.
CODES: dict[str, Codes] = {
    "Q4_0": _at(0, 4.6),
    "Q4_1": Codes(4.6, (Scale(0), Scale(2, 3, negative=True))),
    "Q5_0": _at(0, 9.2),
    "Q5_1": Codes(9.2, (Scale(0), Scale(2, 4, negative=True))),
    "Q8_0": _at(0, 74.0),
    "Q2_K": Codes(14.0, (Scale(80), Scale(82, 0))),
    "Q3_K": _at(108, 43.0),
    "Q4_K": Codes(250.0, (Scale(0), Scale(2, 3))),
    "Q5_K": Codes(500.0, (Scale(0), Scale(2, 4))),
    "Q6_K": _at(208, 1370.0),
    "IQ4_NL": _at(0, 69.0),
    "IQ4_XS": _at(0, 1280.0),
    "IQ2_XXS": _at(0, 68.0),
    "IQ2_XS": _at(0, 68.0),
    "IQ2_S": _at(0, 68.0),
    "IQ3_XXS": _at(0, 145.0),
    "IQ3_S": _at(0, 145.0),
    "IQ1_S": _at(0, 7.0),
    # Its scale is dealt over other fields: see `_patches`.
    "IQ1_M": Codes(7.0, ()),
    "TQ1_0": _at(52, 0.8),
    "TQ2_0": _at(64, 1.1),
    "MXFP4": Codes(3.8, (Scale(0, format=E8M0),)),
    "NVFP4": Codes(5.9, tuple(Scale(at, format=UE4M3) for at in range(4))),
}
FLOATS: dict[str, FloatFormat] = {"F32": F32, "F16": F16, "BF16": BF16}

# The generator's buffer: small enough to stay in cache until its scales are set.
_CHUNK_BYTES = 1 << 18
# Mean of the square of 1 + a mantissa's fraction, as a root.
_MANTISSA_RMS = math.sqrt(7 / 3)


class Patch(NamedTuple):
    """What is done to the bits at byte `at` of each block: some are kept, some set."""

    at: int
    bits: Any
    keep: int
    set: int


def _fixed_bits(form: FloatFormat, exponent: int) -> tuple[int, int]:
    """(bits, random) such that bits | (anything & random) is a float in [2**exponent, 2**(exponent + 1))."""
    if exponent > -form.bias:
        return (exponent + form.bias) << form.mantissa, (1 << form.mantissa) - 1
    # Subnormal: the leading one stands within the mantissa.
    leading = 1 << max(exponent + form.bias - 1 + form.mantissa, 0)
    return leading, leading - 1


def _patches(type_name: str, exponent: int, signed: bool) -> list[Patch]:
    """Patches that make each scale (or float; `signed` ones keep a random sign) a number near 2**exponent."""
    if type_name in FLOATS:
        form = FLOATS[type_name]
        bits, random = _fixed_bits(form, exponent)
        return [Patch(0, form.bits, random | (_sign(form) if signed else 0), bits)]
    if type_name == "IQ1_M":
        # The upper 4 bits of four words make the float16, its lowest bits first; the last two decide its size.
        bits, _ = _fixed_bits(F16, max(exponent, 1 - F16.bias))
        return [Patch(52, np.uint16, 0x0FFF, (bits << 4) & 0xF000), Patch(54, np.uint16, 0x0FFF, bits & 0xF000)]
    patches = []
    for scale in CODES[type_name].scales:
        bits, random = _fixed_bits(scale.format, exponent + scale.shift)
        patches.append(
            Patch(scale.at, scale.format.bits, random, bits | (_sign(scale.format) if scale.negative else 0))
        )
    return patches


def _sign(form: FloatFormat) -> int:
    return 1 << (8 * np.dtype(form.bits).itemsize - 1)


def synthetic_blocks(name: str, type_name: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "... nbytes"]:
    """Made-up bytes of one tensor, as they would stand in a file.

    Args:
      name: the tensor's name; it seeds the bytes. Norms ("*_norm.weight") are positive and near one.
      type_name: ggml's name of the type.
      shape: in numpy order, last = in_features.

    Returns:
      uint8 [*shape[:-1], bytes of a row]; dequantized, all weights are finite, and their standard deviation is about
      1/sqrt(in_features), or as near as the type's scales can come.

    Raises:
      UnsupportedError: a type that no weights are made up for.
      QjaxError: rows that the type's blocks do not divide.
    """
    kind = type_of_name(type_name, name)
    if type_name not in CODES and type_name not in FLOATS:
        raise UnsupportedError(
            f"{name}: no weights of type {type_name} are made up, only {', '.join((*FLOATS, *CODES))}"
        )
    if shape[-1] % kind.block_size:
        raise QjaxError(f"{name}: expected rows of a multiple of {kind.block_size} for {type_name}, got {shape[-1]}")
    norm = name.endswith("_norm.weight")
    spread = CODES[type_name].spread if type_name in CODES else 1.0
    exponent = -1 if norm else round(math.log2(shape[-1] ** -0.5 / (spread * _MANTISSA_RMS)))
    patches = _patches(type_name, exponent, signed=not norm)
    out = np.empty((*shape[:-1], kind.row_bytes(shape[-1])), np.uint8)
    flat = out.reshape(-1)
    source = np.random.SFC64(list(name.encode()))
    # Whole blocks, and whole words of the generator.
    step = _CHUNK_BYTES // (8 * kind.block_bytes) * 8 * kind.block_bytes
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        part[:] = source.random_raw(-(-part.size // 8)).view(np.uint8)[: part.size]
        for patch in patches:
            field = np.ndarray(part.size // kind.block_bytes, patch.bits, part, patch.at, (kind.block_bytes,))
            np.bitwise_and(field, patch.bits(patch.keep), out=field)
            np.bitwise_or(field, patch.bits(patch.set), out=field)
    return out


class Planned(NamedTuple):
    """A tensor of a model: its shape, ggml's type, and its bytes."""

    shape: tuple[int, ...]
    type: str
    nbytes: int


def plan(config: ModelConfig, mix: str) -> dict[str, Planned]:
    """Each tensor that a model of this config and mix has (embeddings not tied), by name, in file order.

    Raises:
      QjaxError: unknown mix.
    """
    expected = expected_shapes(config)
    names = [*TOP, *(f"blk.{i}.{name}.weight" for i in range(config.layers) for name in (*MATRICES, *NORMS))]
    shapes = {name: expected[name] for name in names}
    types = types_of(shapes, Traits(config.arch, config.layers, config.heads, config.kv_heads), Wish(mix))
    planned = {}
    for name, shape in shapes.items():
        kind = types.get(name, "F32")
        planned[name] = Planned(shape, kind, math.prod(shape[:-1]) * type_of_name(kind, name).row_bytes(shape[-1]))
    return planned


def _check_memory(planned: dict[str, Planned], mix: str) -> None:
    """QjaxError unless the host has room for the packed model, or, where an accelerator holds it, for its parts."""
    largest = max(tensor.nbytes for tensor in planned.values())
    needed = largest + (sum(tensor.nbytes for tensor in planned.values()) if jax.default_backend() == "cpu" else 0)
    free = available_memory()
    if free is not None and needed > free:
        raise QjaxError(
            f"made-up weights of type {mix} need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
            "choose a smaller shape or type"
        )


def synthetic_params(
    config: ModelConfig,
    mix: str,
    *,
    lay_out: Place = lay_out,
    place: Place = keep,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Made-up params of a model, as `load_gguf` gives those of a file; at no time more than one tensor beside them.

    Args:
      mix: "q4_0", "q4_k_m", ...; see `qjax.formats.gguf.mixes`.
      lay_out: `lay_out(name, array) -> array` chooses a matrix' memory layout, as in `load_gguf`.
      place: `place(name, array) -> array`: puts an array where it shall live.
      progress: told each tensor's name once it is there.

    Raises:
      QjaxError: unknown mix, or less memory than the packed model needs.
    """
    planned = plan(config, mix)
    _check_memory(planned, mix)

    def make(name: str) -> Any:
        tensor = planned[name]
        array = from_blocks(tensor.type, synthetic_blocks(name, tensor.type, tensor.shape), np.asarray)
        if len(tensor.shape) == 2 and name != "token_embd.weight":
            array = lay_out(name, array)
        array = placed(place, name, array)
        progress(name)
        return array

    params: dict[str, Any] = {key: make(name) for name, key in TOP.items()}
    params["rope"] = placed(place, "rope", inverse_frequencies(config, None))
    params["layers"] = [
        {name: make(f"blk.{i}.{name}.weight") for name in (*MATRICES, *NORMS)} for i in range(config.layers)
    ]
    return params


def save_synthetic(
    path: str | Path, shape: Shape, mix: str, *, progress: Callable[[str], None] = lambda name: None
) -> int:
    """Write the weights that `synthetic_params` makes as a GGUF file, which other programs open too.

    One tensor at a time is in memory; the file appears whole or not at all.

    Returns:
      The number of bytes of the file.

    Raises:
      QjaxError: unknown mix, or the disk refuses.
    """

    def data(name: str, tensor: Planned) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            progress(name)
            return synthetic_blocks(name, tensor.type, tensor.shape)

        return make

    planned = plan(shape.config, mix)
    tensors = (TensorToWrite(name, t.shape, t.type, data(name, t)) for name, t in planned.items())
    [file] = write_gguf(path, metadata(shape, mix), tensors)
    return file.stat().st_size
