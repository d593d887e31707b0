"""The formats that a folder can be saved in: the tensors of each packed weight, and what config.json says of them."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.affine_parts import AffineParts, affine_parts, plain_numpy, plain_shapes
from qjax.formats.huggingface import awq, compressed_tensors_write, gptq, native
from qjax.formats.huggingface.safetensors_file import TensorSpec
from qjax.formats.huggingface.words import words_for
from qjax.version import __version__

EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"
Sizes = Mapping[str, tuple[type[Any] | np.dtype[Any], tuple[int, ...]]]


class Facts(NamedTuple):
    """What a config says of one packed weight.

    group_size: columns of a group, -1 for a row. act_order: columns of a group are no neighbours. rounding: what its
    inputs are rounded to; fixed: by one scale for all tokens.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    rounding: str | None
    fixed: bool


@runtime_checkable
class Target(Protocol):
    """A format; `name` is what `qjax.save` calls it."""

    @property
    def name(self) -> str: ...
    def packs(self, module: str) -> bool:
        """Whether it has packed weights for a module; others are floats."""
        ...

    def specs(self, module: str, array: Any) -> list[TensorSpec]:
        """The tensors of a weight, in the order in which they lie in the file.

        Raises:
          UnsupportedError: the format does not hold the array.
        """
        ...

    def tensors(self, module: str, array: Any) -> Mapping[str, np.ndarray]:
        """These tensors, by name."""
        ...

    def config(self, packed: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` for packed weights by module, and the modules whose weights are floats.

        Raises:
          UnsupportedError: they differ in what the format has once for all.
        """
        ...


def facts_of(array: Any, format_name: str) -> Facts:
    """What an affine array is, by its shapes; UnsupportedError for others."""
    shapes = plain_shapes(array)
    parts = affine_parts(shapes, format_name)
    rounding = compressed_tensors_write.rounding_of(shapes)
    fixed = rounding is not None and shapes.x_scale is not None
    size = -1 if parts.groups == 1 else parts.array.group_size
    return Facts(parts.bits, size, parts.array.zero is None, parts.group_order() is None, rounding, fixed)


def _weights_only(array: Any, format_name: str) -> Facts:
    facts = facts_of(array, format_name)
    if facts.rounding is not None:
        raise UnsupportedError(
            f"{format_name} has no rounded activations: {facts.rounding} ones are dropped by no save"
        )
    return facts


def _half(parts: AffineParts) -> type[Any]:
    return ml_dtypes.bfloat16 if parts.array.scale.dtype == ml_dtypes.bfloat16 else np.float16


def _most(packed: Mapping[str, Facts]) -> Facts:
    """What most modules are."""
    return Counter(packed.values()).most_common(1)[0][0]


class GPTQTarget(NamedTuple):
    """GPTQ, as AutoGPTQ, GPTQModel, vLLM and transformers read it."""

    version: Literal[1, 2]

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def packs(self, module: str) -> bool:
        return module != EMBEDDING

    def specs(self, module: str, array: Any) -> list[TensorSpec]:
        parts = affine_parts(plain_shapes(array), "GPTQ")
        gptq.check(parts)
        (out, columns), groups = parts.shape, parts.groups
        sizes: Sizes = {
            "qweight": (np.int32, (words_for(columns, parts.bits), out)),
            "qzeros": (np.int32, (groups, words_for(out, parts.bits))),
            "g_idx": (np.int32, (columns,)),
            "scales": (_half(parts), (groups, out)),
        }
        return _specs(module, sizes)

    def tensors(self, module: str, array: Any) -> Mapping[str, np.ndarray]:
        facts = gptq.GPTQFacts(facts_of(array, "GPTQ").bits, self.version)
        return _named(module, gptq.write(array, facts))

    def config(self, packed: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        facts = {module: _weights_only(array, "GPTQ") for module, array in packed.items()}
        most = _most(facts)
        # The most specific come first: the first expression that matches counts.
        dynamic: dict[str, dict[str, Any]] = {
            f"+:{_exactly(module)}": {"bits": f.bits, "group_size": f.group_size, "sym": f.symmetric}
            for module, f in facts.items()
            if f[:3] != most[:3]
        }
        dynamic |= {f"-:{_exactly(module)}": {} for module in kept if module not in (EMBEDDING, OUTPUT)}
        found = {
            "quant_method": "gptq",
            "bits": most.bits,
            "group_size": most.group_size,
            "desc_act": any(f.act_order for f in facts.values()),
            "sym": most.symmetric,
            "lm_head": OUTPUT in facts,
            "true_sequential": True,
            "static_groups": False,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "provider": f"qjax {__version__}",
        }
        if self.version == 2:
            # GPTQModel's key; readers that know version 1 alone (transformers with AutoRound) refuse files with it.
            found["meta"] = {"quantizer": [f"qjax:{__version__}"]}
        return {**found, "dynamic": dynamic} if dynamic else found


class AWQTarget(NamedTuple):
    """AWQ, as AutoAWQ, vLLM and transformers read it."""

    version: Literal["gemm", "gemv"] = "gemm"
    name: str = "awq"

    def packs(self, module: str) -> bool:
        return module not in (EMBEDDING, OUTPUT)

    def specs(self, module: str, array: Any) -> list[TensorSpec]:
        parts = affine_parts(plain_shapes(array), "AWQ")
        awq.check(parts)
        (out, columns), groups = parts.shape, parts.groups
        sizes: Sizes = {
            "qweight": (np.int32, (columns, out // 8)),
            "qzeros": (np.int32, (groups, out // 8)),
            "scales": (_half(parts), (groups, out)),
        }
        return _specs(module, sizes)

    def tensors(self, module: str, array: Any) -> Mapping[str, np.ndarray]:
        return _named(module, awq.write(array, awq.AWQFacts(self.version)))

    def config(self, packed: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        facts = {module: _weights_only(array, "AWQ") for module, array in packed.items()}
        most = _most(facts)
        for module, f in facts.items():
            if f.group_size != most.group_size:
                raise UnsupportedError(
                    f"{module}: AWQ has one group size for all, most have {most.group_size}, this {f.group_size}: save "
                    "as gptq or compressed-tensors"
                )
        return {
            "quant_method": "awq",
            "bits": awq.BITS,
            "group_size": most.group_size,
            "zero_point": True,
            "version": self.version,
            "modules_to_not_convert": [OUTPUT, *(module for module in kept if module not in (EMBEDDING, OUTPUT))],
        }


class CompressedTensorsTarget(NamedTuple):
    """compressed-tensors, as vLLM and transformers read it."""

    name: str = compressed_tensors_write.NAME

    def packs(self, module: str) -> bool:
        return module != EMBEDDING

    def specs(self, module: str, array: Any) -> list[TensorSpec]:
        parts, facts = affine_parts(plain_shapes(array), self.name), facts_of(array, self.name)
        (out, columns), groups = parts.shape, parts.groups
        sizes: dict[str, Any] = {}
        if facts.rounding is None:
            sizes["weight_packed"] = (np.int32, (out, words_for(columns, facts.bits)))
            sizes["weight_shape"] = (np.int64, (2,))
            if not facts.symmetric:
                sizes["weight_zero_point"] = (np.int32, (words_for(out, facts.bits), groups))
            if facts.act_order:
                sizes["weight_g_idx"] = (np.int32, (columns,))
        else:
            sizes["weight"] = (np.int8, (out, columns))
            if not facts.symmetric:
                sizes["weight_zero_point"] = (np.int8, (out, groups))
            if facts.fixed:
                sizes["input_scale"] = (np.float32, (1,))
        return _specs(module, {**sizes, "weight_scale": (_half(parts), (out, groups))})

    def tensors(self, module: str, array: Any) -> Mapping[str, np.ndarray]:
        return _named(module, compressed_tensors_write.write(array))

    def config(self, packed: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        facts = {module: facts_of(array, self.name) for module, array in packed.items()}
        moved = [module for module, f in facts.items() if f.act_order]
        if moved:
            warnings.warn(
                f"{moved[0]} and {len(moved) - 1} more have columns in groups by act-order (weight_g_idx), which vLLM "
                "reads and compressed-tensors 0.19 does not: save as gptq, or quantize with static groups",
                QjaxWarning,
                stacklevel=2,
            )
        kinds = list(dict.fromkeys(facts.values()))
        groups: dict[str, Any] = {}
        for i, kind in enumerate(kinds):
            names = [module for module, f in facts.items() if f == kind]
            groups[f"group_{i}"] = _config_group(kind, ["Linear"] if len(kinds) == 1 else names)
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [module for module in kept if module != EMBEDDING],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


class NativeTarget(NamedTuple):
    """qjax's own: any packed array, as it is."""

    name: str = "qjax"

    def packs(self, module: str) -> bool:
        return True

    def specs(self, module: str, array: Any) -> list[TensorSpec]:
        return native.specs_of(native.describe(f"{module}.weight", plain_shapes(array)))

    def tensors(self, module: str, array: Any) -> Mapping[str, np.ndarray]:
        return native.describe(f"{module}.weight", plain_numpy(array)).leaves

    def config(self, packed: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": "qjax", "version": native.VERSION, "modules_to_not_convert": list(kept)}


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (GPTQTarget(1), GPTQTarget(2), AWQTarget(), CompressedTensorsTarget(), NativeTarget())
}


def target_named(name: str) -> Target:
    """The format that `qjax.save` calls so.

    Raises:
      QjaxError: there is none; lists those that there are.
    """
    if name not in TARGETS:
        raise QjaxError(f"expected a format of {', '.join(TARGETS)} or gguf, got {name!r}")
    return TARGETS[name]


def holding(module: str, array: Any) -> list[str]:
    """The names of the formats that hold a weight."""

    def holds(target: Target) -> bool:
        try:
            target.tensors(module, array)
            target.config({module: array}, ())
        except UnsupportedError:
            return False
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QjaxWarning)
        return [name for name, target in TARGETS.items() if holds(target)]


def _specs(module: str, sizes: Sizes) -> list[TensorSpec]:
    return [TensorSpec(f"{module}.{suffix}", np.dtype(kind), shape) for suffix, (kind, shape) in sizes.items()]


def _named(module: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _exactly(module: str) -> str:
    """A regular expression of one module's name, as GPTQ's `dynamic` has them."""
    return f"^{re.escape(module)}$"


def _config_group(kind: Facts, targets: list[str]) -> dict[str, Any]:
    """One of compressed-tensors' `config_groups`."""
    channel = kind.group_size == -1
    weights = {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": kind.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else kind.group_size,
        "dynamic": False,
        "actorder": "group" if kind.act_order else None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = None
    if kind.rounding is not None:
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor" if kind.fixed else "token",
            "group_size": None,
            "dynamic": not kind.fixed,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax" if kind.fixed else None,
            "observer_kwargs": {},
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "pack-quantized" if kind.rounding is None else "int-quantized",
    }
