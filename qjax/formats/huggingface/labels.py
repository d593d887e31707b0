"""What a folder says of its quantization. Tensors decide what they are; this says what they do not, and may be wrong.

Sources: transformers' utils/quantization_config.py; compressed-tensors' quant_args.py and match.py; GPTQModel's README
("dynamic"); AutoRound's export (extra_config); AutoAWQ's quant_config.json.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface.json_files import read_if_there

# Beside config.json: AutoRound's, AutoGPTQ's and AutoAWQ's.
FILES = ("quantization_config.json", "quantize_config.json", "quant_config.json")
# Lists of modules that stay floats, in the words of compressed-tensors, transformers, AutoFP8 and bitsandbytes.
_EXCEPTIONS = ("ignore", "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules")
# What serving programs make one module of.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_LONGEST_PATTERN = 400
# A repetition of what repeats: it can take time without end.
_ENDLESS = re.compile(r"\([^()]*[*+}][^()]*\)\s*[*+{]")


class Said(NamedTuple):
    """What is said of one module's weight; None where nothing is.

    Attributes:
        activations: compressed-tensors' arguments of input_activations, {} for floats.
        block: rows and columns of a 2-D block.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    activations: Mapping[str, Any] = {}
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Labels:
    """The quantization config of a folder; `values` are empty if it has none."""

    path: Path
    values: Mapping[str, Any]

    @property
    def method(self) -> str:
        """quant_method in lower case; "" if it is not said."""
        return str(self.values.get("quant_method") or "").lower()

    @property
    def text(self) -> str:
        """Method and format in a few words, for messages."""
        words = [self.method or "no method"]
        words += [str(self.values[key]) for key in ("checkpoint_format", "version", "format") if key in self.values]
        return " ".join(shown(word)[1:-1] for word in words) if self.values else "no quantization config"

    def exempts(self, module: str) -> bool:
        """Whether the module is said to have stayed as it was."""
        names = {module, re.sub(r"(\w+)$", lambda last: _FUSED.get(last[1], last[1]), module)}
        for key in _EXCEPTIONS:
            listed = self.values.get(key)
            for entry in listed if isinstance(listed, list) else ():
                if isinstance(entry, str) and any(self._is_exception(entry, name) for name in names):
                    return True
        dynamic = self._object("dynamic")
        if any(key.startswith("-:") and self._matches(key[2:], module) for key in dynamic):
            return True
        if self._own(module).get("bits") == 16:
            return True
        return module == "lm_head" and self.values.get("lm_head") is False

    def said(self, module: str) -> Said:
        """What is said of a module."""
        groups = self.values.get("config_groups")
        if isinstance(groups, dict):
            return self._of_groups(module, groups)
        values = {**self.values, **self._own(module)}
        symmetric = values.get("sym")
        if symmetric is None and isinstance(values.get("zero_point"), bool):
            symmetric = not values["zero_point"]
        bits = _number(values.get("bits", values.get("w_bit")))
        group = _number(values.get("group_size", values.get("q_group_size")))
        activations: dict[str, Any] = {}
        if self.method in ("fp8", "fbgemm_fp8"):
            activations = {"num_bits": 8, "type": "float", "dynamic": values.get("activation_scheme") != "static"}
            if self.method == "fp8" and values.get("weight_block_size"):
                activations["strategy"] = "group"
        return Said(
            bits,
            group,
            symmetric if isinstance(symmetric, bool) else None,
            activations,
            _block(values.get("weight_block_size")),
        )

    def _own(self, module: str) -> Mapping[str, Any]:
        """A module's own values: GPTQModel's "dynamic", AutoRound's "extra_config"."""
        for key, values in self._object("dynamic").items():
            if not key.startswith("-:") and isinstance(values, dict) and self._matches(key.removeprefix("+:"), module):
                return values
        extra = self._object("extra_config")
        found = extra.get(module)
        if found is None:
            found = next((v for key, v in extra.items() if "*" in key and self._matches(key, module)), None)
        return found if isinstance(found, dict) else {}

    def _of_groups(self, module: str, groups: Mapping[str, Any]) -> Said:
        """By compressed-tensors' groups: a name before an expression before a class."""
        best: tuple[int, Mapping[str, Any]] | None = None
        for group in groups.values():
            targets = group.get("targets") if isinstance(group, dict) else None
            for target in targets if isinstance(targets, list) else ():
                rank = self._rank(str(target), module)
                if rank is not None and (best is None or rank < best[0]):
                    best = rank, group
        if best is None:
            return Said()
        weights, inputs = best[1].get("weights"), best[1].get("input_activations")
        weights = weights if isinstance(weights, dict) else {}
        group = _number(weights.get("group_size"))
        if group is None and weights.get("strategy") == "channel":
            group = -1
        symmetric = weights.get("symmetric")
        return Said(
            _number(weights.get("num_bits")),
            group,
            symmetric if isinstance(symmetric, bool) else None,
            inputs if isinstance(inputs, dict) else {},
            _block(weights.get("block_structure")),
        )

    def _rank(self, target: str, module: str) -> int | None:
        if target == module:
            return 0
        if target.startswith("re:"):
            return 1 if self._matches(target[3:], module) else None
        return 2 if target in ("Linear", "LinearBase") else None

    def _is_exception(self, entry: str, module: str) -> bool:
        """As the kindest of the peers: an expression, or whole parts of the name."""
        if entry.startswith("re:"):
            return self._matches(entry[3:], module)
        return f".{entry}." in f".{module}."

    def _matches(self, expression: str, module: str) -> bool:
        if len(expression) > _LONGEST_PATTERN or _ENDLESS.search(expression):
            raise UnsupportedError(
                f"{self.path}: the expression {shown(expression)} could take endless time: simplify it"
            )
        try:
            return re.match(expression, module) is not None
        except re.error as error:
            raise FormatError(f"{self.path}: {shown(expression)} is no regular expression: {error}") from error

    def _object(self, key: str) -> Mapping[str, Any]:
        found = self.values.get(key)
        return found if isinstance(found, dict) else {}


def read_labels(folder: Path, config: Mapping[str, Any]) -> Labels:
    """What config.json (its values) says, or a file beside it.

    Raises:
        FormatError: a file is damaged, or what should be an object is none.
    """
    path = folder / "config.json"
    for key in ("quantization_config", "compression_config"):
        values = config.get(key)
        if isinstance(values, dict):
            # llm-compressor once had the one in the other.
            inner = values.get("quantization_config")
            return Labels(path, inner if isinstance(inner, dict) else values)
        if values is not None:
            raise FormatError(f"{path}: {key} is {shown(str(values))}, expected an object")
    for name in FILES:
        values = read_if_there(folder / name)
        if values:
            return Labels(folder / name, values)
    return Labels(path, {})


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _block(value: Any) -> tuple[int, int] | None:
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(part) for part in value.split("x")]
    if isinstance(value, list) and len(value) == 2 and all(type(part) is int and part > 0 for part in value):
        return value[0], value[1]
    return None
