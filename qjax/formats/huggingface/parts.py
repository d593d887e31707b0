"""The tensors of a checkpoint by module: "model.layers.0.mlp.up_proj" has a "qweight", "scales", "qzeros", ..."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from qjax.errors import FormatError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface.checkpoint import StoredTensor, as_numpy

# What may follow a module's name; the longest that fits counts. bitsandbytes' stand behind ".weight".
SUFFIXES = (
    *("weight", "bias", "qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "weight_scale_inv", "SCB", "weight_format"),
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
)
FLOATS = ("F32", "F16", "BF16")
# What serving programs round keys, values and outputs by, which stay floats here.
OUTPUT_SCALES = frozenset(["k_scale", "v_scale", "q_scale", "output_scale", "output_zero_point"])


class Found(NamedTuple):
    """A weight matrix that is packed in a way that no ggml type is, and how that was seen.

    Attributes:
        module: its name in the checkpoint.
        kind: "gptq", "gptq_v2", "awq", "awq-gemv", compressed-tensors' name of a format, "fp8", "bitsandbytes-nf4", ...
        bits: of a code. group_size: columns that share a scale, -1 for all of a row.
        label: all that in a few words.
        how: what each was decided by, and what is not done as the file says.
    """

    module: str
    kind: str
    bits: int
    group_size: int
    label: str
    how: str


class Packed(NamedTuple):
    """A matrix that was found: `read` makes the array of the tensors `parts`, by suffix; shape is [out, in]."""

    found: Found
    shape: tuple[int, int]
    parts: Mapping[str, StoredTensor]
    read: Callable[[Mapping[str, np.ndarray]], Any]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return sum(stored.nbytes for stored in self.parts.values())


class Parts:
    """One module's tensors by suffix; `shape` is what its weight should have, [out, in]."""

    def __init__(
        self,
        module: str,
        stored: Mapping[str, StoredTensor],
        raw: Callable[[str], UInt8[np.ndarray, " nbytes"]],
        shape: tuple[int, int],
    ) -> None:
        self.module = module
        self.stored = stored
        self.shape = shape
        self._raw = raw

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.stored

    @property
    def path(self) -> Path:
        """Of the file that holds the first of them."""
        return next(iter(self.stored.values())).path

    def where(self, suffix: str | None = None) -> str:
        """How an error's message begins; without `suffix` it names the module."""
        if suffix is None:
            return f"{self.path}: {shown(self.module)}"
        if suffix in self.stored:
            return f"{self.stored[suffix].path}: tensor {shown(self.stored[suffix].name)}"
        return f"{self.path}: tensor {shown(f'{self.module}.{suffix}')}"

    def wrong(self, suffix: str, problem: str) -> FormatError:
        """The error that says what is the matter with a tensor."""
        return FormatError(f"{self.where(suffix)} {problem}: download the model or make it again")

    def need(self, suffix: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> StoredTensor:
        """A tensor that has to be there, of one of the dtypes and, if any are given, one of the shapes.

        Raises:
            FormatError: it is not so.
        """
        stored = self.stored.get(suffix)
        if stored is None:
            raise self.wrong(suffix, f"is missing beside {', '.join(self.stored)}")
        if stored.dtype not in dtypes:
            raise self.wrong(suffix, f"is {stored.dtype}, expected {' or '.join(dtypes)}")
        if shapes and stored.shape not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise self.wrong(suffix, f"has the shape {stored.shape}, expected {wanted} for a weight {self.shape}")
        return stored

    def read(self, suffix: str) -> Shaped[np.ndarray, "..."]:
        """A tensor's numbers; 8-bit floats as their bits."""
        return as_numpy(self.stored[suffix], self._raw(self.stored[suffix].name))

    def choose(self, *suffixes: str) -> dict[str, StoredTensor]:
        """Those of the suffixes that are there."""
        return {suffix: self.stored[suffix] for suffix in suffixes if suffix in self.stored}

    def finite(self, suffix: str, values: np.ndarray) -> np.ndarray:
        """The values as they are.

        Raises:
            FormatError: one is infinite or none.
        """
        # Of bfloat16 numpy asks only by way of float32.
        if not np.isfinite(values.astype(np.float32)).all():
            raise self.wrong(suffix, "has numbers that are not finite")
        return values


def by_module(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Each module's tensors by suffix; a name that ends in none of `SUFFIXES` is a module with the suffix ""."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    longest_first = sorted(SUFFIXES, key=len, reverse=True)
    for name, stored in tensors.items():
        suffix = next((suffix for suffix in longest_first if name.endswith(f".{suffix}")), "")
        modules.setdefault(name[: -len(suffix) - 1] if suffix else name, {})[suffix] = stored
    return modules
