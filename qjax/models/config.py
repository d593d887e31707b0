"""What a decoder is, apart from its weights: sizes and switches, read from a file's metadata."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.errors import FormatError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Arch:
    """What an architecture's name alone decides.

    rope_interleaved: rotary pairs are (2i, 2i+1), else (i, i + half).
    qk_norm: queries and keys are normed, head by head, before they are turned.
    """

    rope_interleaved: bool
    qk_norm: bool = False


# Llama covers Llama 1 to 3, TinyLlama, Mistral, SmolLM and everything else that converts to it.
ARCHS: dict[str, Arch] = {
    "llama": Arch(rope_interleaved=True),
    "qwen2": Arch(rope_interleaved=False),
    "qwen3": Arch(rope_interleaved=False, qk_norm=True),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes; hashable, so that it can be a static argument of a jitted function.

    Biases and an output matrix are there where the params have them: they are no switches here.
    """

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_dim: int
    rope_factor: float = 1.0
    window: int | None = None

    @property
    def rope_interleaved(self) -> bool:
        return ARCHS[self.arch].rope_interleaved

    @property
    def qk_norm(self) -> bool:
        return ARCHS[self.arch].qk_norm


_REQUIRED = object()


class _Reader:
    """Typed look-ups under `<arch>.`, with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.metadata, self.arch = metadata, arch

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        full = f"{self.arch}.{key}"
        value = self.metadata.get(full)
        if value is None:
            if default is _REQUIRED:
                raise FormatError(f"metadata lacks {full!r}: the file is incomplete or not a {self.arch} model")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            what = type(value).__name__
            raise FormatError(f"metadata {full!r} is {what}, expected one {kind.__name__}")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer of sane size (it becomes shapes and loop counts)."""
        value = self.get(key, int, default)
        if not 0 < value < 1 << 24:
            raise FormatError(f"metadata '{self.arch}.{key}' is {value}, expected 1 to {(1 << 24) - 1}")
        return value


def known_archs() -> str:
    return ", ".join(sorted(ARCHS))


def config_from_gguf(metadata: Mapping[str, Any], vocab: int) -> ModelConfig:
    """Config of a GGUF file's metadata; `vocab` is the number of rows of its embedding.

    Raises:
      UnsupportedError: an architecture, or a variant of one, that is not known; lists the known ones.
      FormatError: a key is missing or makes no sense.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise FormatError("metadata lacks 'general.architecture': this is no model file")
    if arch not in ARCHS:
        raise UnsupportedError(f"architecture {arch[:64]!r} is not known; known are {known_archs()}")
    read = _Reader(metadata, arch)
    if read.get("expert_count", int, 0) > 0:
        raise UnsupportedError(
            f"this {arch} model is a mixture of experts (as Mixtral); known are dense {known_archs()}"
        )
    heads, hidden = read.count("attention.head_count"), read.count("embedding_length")
    kv_heads = read.count("attention.head_count_kv", heads)
    head_dim = read.count("attention.key_length", max(hidden // heads, 1))
    if read.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{arch}: keys and values of different length are not known")
    if heads % kv_heads:
        raise FormatError(f"{heads} attention heads cannot share {kv_heads} key/value heads")
    rope_dim = read.count("rope.dimension_count", head_dim)
    if rope_dim > head_dim or rope_dim % 2:
        raise FormatError(f"rotary dimension {rope_dim} does not fit heads of {head_dim}")
    # As llama.cpp has it: linear where only a factor is named (once under another key), a factor of 0 meaning none.
    scaling = read.get("rope.scaling.type", str, "linear")
    if scaling not in ("none", "linear"):
        known = "none, linear (and Llama 3's, by rope_freqs.weight)"
        raise UnsupportedError(f"{arch}: rope scaling {scaling!r} is not known; known are {known}")
    factor = read.get("rope.scaling.factor", float, read.get("rope.scale_linear", float, 1.0)) or 1.0
    if scaling == "none":
        factor = 1.0
    eps, theta = read.get("attention.layer_norm_rms_epsilon", float), read.get("rope.freq_base", float, 1e4)
    if not (0 <= eps < 1 and 0 < theta < 1e30 and 1e-6 < factor < 1e6):
        raise FormatError(f"{arch}: norm epsilon {eps}, rope base {theta}, rope factor {factor} make no sense")
    windowed = read.get("attention.sliding_window", int, 0) != 0
    return ModelConfig(
        arch=arch,
        layers=read.count("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=read.count("feed_forward_length"),
        vocab=vocab,
        context=read.count("context_length"),
        norm_eps=eps,
        rope_theta=theta,
        rope_dim=rope_dim,
        rope_factor=factor,
        window=read.count("attention.sliding_window") if windowed else None,
    )
