"""A run's YAML file -> frozen dataclasses, with each mistake named: unknown key, missing key, wrong type.

The dataclasses are the only list of what a file may say: names, types and defaults are read off their fields.
"""

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from qjax.errors import QjaxError
from qjax.formats.yaml_file import read_yaml

T = TypeVar("T")


def _refuse_below_one(config: Any, where: str, besides: tuple[str, ...] = ()) -> None:
    """QjaxError for the first count (a field of type int) below 1."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is int and value < 1 and field.name not in besides:
            raise QjaxError(f"{where}.{field.name}: expected at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Which text: `folder` of *.py files (relative to the config file; null: Python's standard library)."""

    folder: str | None
    held_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """The sizes of a Llama-architecture model with tied embeddings."""

    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    context_length: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _refuse_below_one(self, "model")
        if not 258 <= self.vocab_size <= 65536:
            raise QjaxError(f"model.vocab_size: expected 258 (bytes, BOS, EOS) to 65536, got {self.vocab_size}")
        if self.n_heads % self.n_kv_heads:
            raise QjaxError(f"model.n_heads: expected a multiple of n_kv_heads {self.n_kv_heads}, got {self.n_heads}")
        if self.context_length < 8 or self.context_length % 2:
            raise QjaxError(f"model.context_length: expected an even number from 8, got {self.context_length}")
        if self.head_dim % 2:
            raise QjaxError(f"model.head_dim: expected an even number (rope turns pairs), got {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay to `final_fraction` of the peak, and gradient clipping."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _refuse_below_one(self, "optimizer")
        if self.warmup_steps >= self.steps:
            raise QjaxError(f"optimizer.warmup_steps: expected fewer than steps {self.steps}, got {self.warmup_steps}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. `folder` (checkpoints) and `output` (the GGUF file) are relative to the config file."""

    kind: str
    name: str
    seed: int
    folder: str
    output: str
    corpus: CorpusConfig
    model: ShapeConfig
    optimizer: OptimizerConfig
    evaluate_every: int = 500
    checkpoint_minutes: float = 3.0

    def __post_init__(self) -> None:
        _refuse_below_one(self, "config", besides=("seed",))


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """A quantized model from a float one, as `qjax quantize` makes it.

    `output`, `imatrix`, `data`, `evaluate`, and where they are files `source` and `type` (a mix), are relative to the
    config file. `target_bpw`, `target_size` ("3.5GiB"): a budget, with `chunks` of `data`, and `types` (or schemes) to
    choose from (none: all).

    With `type`, or a budget alone, a GGUF file. `tensor_types`: texts REGEX=TYPE. `data`: a text for a budget; None for
    text that the model writes.

    With `method` ("gptq") what its `format` says. `scheme`: "w4g128-asym"; None for the method's usual one. `rules`:
    texts REGEX=SCHEME or REGEX=keep. `act_order`, `damp`, `steps`: options of the method. `data`, `samples`, `seq_len`,
    `seed`: see `qjax.Calibration`.
    """

    kind: str
    source: str
    output: str
    type: str | None = None
    method: str | None = None
    imatrix: str | None = None
    target_bpw: float | None = None
    target_size: str | None = None
    data: str | None = None
    chunks: int = 8
    types: tuple[str, ...] = ()
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[str, ...] = ()
    allow_requantize: bool = False
    format: str | None = None
    scheme: str | None = None
    rules: tuple[str, ...] = ()
    act_order: bool | None = None
    damp: float | None = None
    steps: int | None = None
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    batch: int = 8
    evaluate: str | None = None

    def __post_init__(self) -> None:
        """Refuses what is of the other way."""
        of_mixes = ("type", "imatrix", "pure", "output_tensor_type", "token_embedding_type", "tensor_types")
        of_methods = ("format", "scheme", "rules", "act_order", "damp", "steps", "samples", "seq_len", "seed", "batch")
        others = (*of_mixes, "allow_requantize") if self.method is not None else (*of_methods, "evaluate")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in others if getattr(self, name) != defaults[name]]
        if given:
            why = "is for a mix, not for a method" if self.method is not None else "is for a method: give one"
            raise QjaxError(f"{', '.join(given)}: {why}")


CONFIGS: dict[str, type] = {"train": TrainConfig, "quantize": QuantizeConfig}


def load_config(path: Path) -> Any:
    """Reads a config file; its `kind` says which dataclass (a value of `CONFIGS`) comes back.

    Raises:
        QjaxError: names the file, the key, what was expected and what was found.
    """
    data = read_yaml(path)
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise QjaxError(f"{path}: kind: expected one of {sorted(CONFIGS)}, got {kind!r}")
    try:
        return parse(CONFIGS[kind], data)
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}") from error


def parse(cls: type[T], data: Any, where: str = "") -> T:
    """Builds the dataclass `cls` from what YAML gave, checking keys and types all the way down."""
    if not isinstance(data, dict):
        raise QjaxError(f"{where or 'config'}: expected keys and values, got {data!r}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in fields:
            raise QjaxError(f"{prefix}{key}: unknown key; known ones are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING:
            raise QjaxError(f"{prefix}{name}: missing; expected {_describe(hints[name])}")
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        return _value(next(kind for kind in hint.__args__ if kind is not type(None)), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise QjaxError(f"{where}: expected {_describe(hint)}, got {value!r}")
        kind = typing.get_args(hint)[0]
        return tuple(_value(kind, item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        # YAML 1.1 reads 2e-3 as text: the commonest mistake in such files.
        remedy = " (YAML wants a point in it: 2.0e-3)" if hint is float and isinstance(value, str) else ""
        raise QjaxError(f"{where}: expected {_describe(hint)}, got {value!r}{remedy}")
    return value


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "keys and values"
    if typing.get_origin(hint) is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def as_json(config: Any) -> dict[str, Any]:
    """The config as JSON would give it back (tuples are lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Any) -> str:
    """sha256 of the config's values, whatever the file's comments and order."""
    return hashlib.sha256(json.dumps(as_json(config), sort_keys=True).encode()).hexdigest()
