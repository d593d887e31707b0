"""Bytes of a model's units once its weights are packed in memory, by headers alone: no weight is read.

A model is a row of units: token_embd, blk.0 ... blk.N-1, output (output_norm and the output matrix, or the embedding
once more where that serves as one).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qjax.arrays.lanes import LANES, STEP
from qjax.errors import QjaxError
from qjax.formats.gguf.arrays import BLOCK_TYPES, FLOAT_TYPES
from qjax.formats.gguf.places import Traits, traits_of
from qjax.formats.gguf.plan import Wish, types_of
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.source import Source
from qjax.kernels import native
from qjax.models import ModelConfig
from qjax.models.load import IGNORED_SUFFIXES, MATRICES, TOP, checked_config, expected_shapes, layer_weights
from qjax.models.rewrite import names_mix, plain_type

EMBEDDING, OUTPUT = "token_embd", "output"
_TIED_HEAD = "token_embd.weight"


class Bytes(NamedTuple):
    """Bytes by what a mesh of n devices does with them.

    whole: each has all. cut: each has 1/n. kv: cut by key and value heads, of which each device has at least one.
    vocab: cut by rows if n divides them.
    """

    whole: int = 0
    cut: int = 0
    kv: int = 0
    vocab: int = 0

    def __add__(self, other: tuple) -> "Bytes":
        return Bytes(*(a + b for a, b in zip(self, other, strict=True)))

    def on(self, n: int, config: ModelConfig) -> int:
        """Bytes on each of n devices."""
        vocab = -(-self.vocab // n) if config.vocab % n == 0 else self.vocab
        return self.whole + -(-self.cut // n) + -(-self.kv // min(n, config.kv_heads)) + vocab


class Unit(NamedTuple):
    """A unit: bytes as they lie side by side and in the lanes of CPU kernels; weights that each token is multiplied
    with, and the bytes of these."""

    name: str
    plain: Bytes
    lanes: Bytes
    multiplied: int


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What a plan needs to know of a model.

    Attributes:
      name: of the file or the shape.
      config: its sizes.
      units: in order; the last one's bytes hold the embedding once more if it is `tied`.
      tied: the embedding is the output's matrix too, one array where both lie on the same device.
      type: what float matrices become, None for as they are.
      quantized: weights that are packed already, which no type changes.
    """

    name: str
    config: ModelConfig
    units: tuple[Unit, ...]
    tied: bool
    type: str | None = None
    quantized: bool = False

    def weights(self, start: int, stop: int, kind: str, n: int = 1) -> int:
        """Bytes of the units start to stop - 1 on each of n devices of a kind ("cpu")."""
        sums = self._sums[kind == "cpu" and native.available()]
        held = [last - first for first, last in zip(sums[start], sums[stop], strict=True)]
        if self.tied and start == 0 and stop == len(self.units):
            held[-1] -= sums[1].vocab
        return Bytes(*held).on(n, self.config)

    @functools.cached_property
    def _sums(self) -> tuple[list[Bytes], list[Bytes]]:
        """Bytes of the first 0, 1, ... units, as they lie plainly and in lanes."""
        zero = Bytes()
        return (
            list(itertools.accumulate((unit.plain for unit in self.units), Bytes.__add__, initial=zero)),
            list(itertools.accumulate((unit.lanes for unit in self.units), Bytes.__add__, initial=zero)),
        )

    @functools.cached_property
    def multiplied(self) -> list[int]:
        """Weights that a token is multiplied with in the first 0, 1, ... units."""
        return list(itertools.accumulate((unit.multiplied for unit in self.units), initial=0))


def model_sizes(
    model: Source | ModelConfig,
    type: str | None = None,
    *,
    name: str | None = None,
    anew: bool = False,
    packed: Mapping[str, int] | None = None,
) -> ModelSizes:
    """Sizes of an open file or folder, or of a model of which there is a config alone (float16, embeddings not tied).

    Args:
      type: a plain type or a mix that float matrices are quantized to while they are loaded.
      name: of the model, for people.
      anew: as if all matrices were floats: the sizes of another file of the model.
      packed: bytes of matrices that are packed in some other way while they are loaded.

    Raises:
      QjaxError: an unknown type, or one for a model without float matrices; see `checked_config`.
    """
    if isinstance(model, ModelConfig):
        config = model
        given = {
            key: (shape, "F16" if len(shape) > 1 else "F32", None)
            for key, shape in expected_shapes(config).items()
            if not key.endswith(".bias") and key != "rope_freqs.weight"
        }
        traits = Traits(config.arch, config.layers, config.heads, config.kv_heads)
    else:
        config = checked_config(model)
        given = {
            key: (info.shape, info.type, info.nbytes if key in model.found else None)
            for key, info in model.tensors.items()
        }
        traits = traits_of(model.metadata)
    floats = [key for key, (shape, kind, _) in given.items() if len(shape) == 2 and (anew or kind in FLOAT_TYPES)]
    quantized = not any(len(shape) == 2 and kind in FLOAT_TYPES for shape, kind, _ in given.values())
    if type is not None:
        if not floats:
            raise QjaxError(f"{name or 'the model'}: every matrix is quantized already; leave the type out")
        wanted = wanted_types({key: shape for key, (shape, _, _) in given.items()}, traits, type)
        given |= {key: (given[key][0], wanted[key], None) for key in floats if key in wanted}
    given |= {key: (*given[key][:2], nbytes) for key, nbytes in (packed or {}).items()}
    tied = "output.weight" not in given
    label = name or (config.arch if isinstance(model, ModelConfig) else str(model.path))
    return ModelSizes(label, config, _units(given, config, tied), tied, type, quantized)


def wanted_types(shapes: Mapping[str, Sequence[int]], traits: Traits, type: str) -> dict[str, str]:
    """The type of each matrix by a plain type or a mix, as `qjax.load(quantize=type)` gives it.

    Raises:
      QjaxError: an unknown type.
    """
    if names_mix(type):
        return types_of({name: tuple(shape) for name, shape in shapes.items()}, traits, Wish(type))
    kind = plain_type(type)
    block = GGML_TYPES[kind].block_size
    return {name: kind if shape[-1] % block == 0 else "F16" for name, shape in shapes.items() if len(shape) == 2}


def _units(
    given: Mapping[str, tuple[tuple[int, ...], str, int | None]], config: ModelConfig, tied: bool
) -> tuple[Unit, ...]:
    """Units of tensors (shape, type, bytes if the type does not tell)."""
    names = [EMBEDDING, *(f"blk.{i}" for i in range(config.layers)), OUTPUT]
    plain, lanes = dict.fromkeys(names, Bytes()), dict.fromkeys(names, Bytes())
    multiplied = dict.fromkeys(names, 0)
    kept = {f"{key}.weight" for key in layer_weights(config)} | {f"{key}.bias" for key in MATRICES}
    for name, (shape, kind, nbytes) in given.items():
        layer = name.split(".", 2)
        if name in TOP:
            units = [EMBEDDING] if name == _TIED_HEAD else [OUTPUT]
            units += [OUTPUT] if name == _TIED_HEAD and tied else []
        elif layer[0] == "blk" and len(layer) == 3 and layer[2] in kept and not name.endswith(IGNORED_SUFFIXES):
            units = [".".join(layer[:2])]
        else:
            # Scales that become part of their weights, tables that are computed: a few numbers.
            continue
        size = _nbytes(shape, kind) if nbytes is None else nbytes
        in_lanes = len(shape) == 2 and (name != _TIED_HEAD or tied) and (nbytes is not None or kind in BLOCK_TYPES)
        padded = _in_lanes(size, shape) if in_lanes else size
        for unit in units:
            plain[unit] += _shared(name, shape, size)
            lanes[unit] += _shared(name, shape, padded)
            multiplied[unit] += math.prod(shape) if len(shape) == 2 and unit != EMBEDDING else 0
    return tuple(Unit(name, plain[name], lanes[name], multiplied[name]) for name in names)


def _shared(name: str, shape: tuple[int, ...], size: int) -> Bytes:
    if name in (_TIED_HEAD, "output.weight"):
        return Bytes(vocab=size)
    if "attn_k." in name or "attn_v." in name:
        return Bytes(kv=size)
    return Bytes(cut=size) if len(shape) == 2 or name.endswith(".bias") else Bytes(whole=size)


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    if kind == "F64":
        return math.prod(shape) * 4
    return math.prod(shape[:-1]) * GGML_TYPES[kind].row_bytes(shape[-1])


def _in_lanes(size: int, shape: tuple[int, ...]) -> int:
    """Bytes with rows and columns filled up to whole tiles and steps."""
    rows, columns = shape
    return -(-size * (rows + -rows % LANES) * (columns + -columns % STEP) // (rows * columns))
