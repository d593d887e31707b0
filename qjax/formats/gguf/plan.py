"""Which type each tensor of a file gets when it is quantized: a mix, and what the user wants otherwise.

Precedence, as llama-quantize has it: `embedding_type` and `output_type`; then the first of `overrides` that is found in
the name; then the mix (or its base type alone, if `pure`). What rows do not allow falls back to another type.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qjax.errors import QjaxError
from qjax.formats.gguf.mixes import fitting, is_quantizable, mix_of, tensor_type
from qjax.formats.gguf.types import GGML_TYPES
from qjax.formats.source import Source


class Wish(NamedTuple):
    """What is asked for.

    mix: a name of `mixes.MIXES`. pure: its base type for every matrix. overrides: (regular expression, ggml type), the
    first that is found in a tensor's name decides. imatrix: importances are known (some mixes go by that).
    """

    mix: str
    pure: bool = False
    output_type: str | None = None
    embedding_type: str | None = None
    overrides: Sequence[tuple[str, str]] = ()
    imatrix: bool = False


def type_named(name: str) -> str:
    """ggml's name of a type, from any case.

    Raises:
      QjaxError: there is no such type.
    """
    for known in (name, name.upper(), name.lower()):
        if known in GGML_TYPES:
            return known
    raise QjaxError(f"expected a ggml type such as Q4_K or F16, got {name!r}")


def override(text: str) -> tuple[str, str]:
    """(regular expression, type) of "REGEX=TYPE".

    Raises:
      QjaxError: no such form, a broken expression, or an unknown type.
    """
    pattern, sign, kind = text.rpartition("=")
    if not sign or not pattern:
        raise QjaxError(f"expected REGEX=TYPE such as 'ffn_down=q6_k', got {text!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise QjaxError(f"expected REGEX=TYPE, got {text!r}: {error}") from None
    return pattern, type_named(kind)


def _number(metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(f"{metadata.get('general.architecture')}.{key}", default)
    return value if isinstance(value, int) else default


def plan(file: Source, wish: Wish) -> dict[str, str]:
    """The type of each tensor in the quantized file; vectors, norms and the like keep theirs.

    Raises:
      QjaxError: an unknown mix or type.
    """
    base = mix_of(wish.mix).base
    layers = _number(file.metadata, "block_count", 0)
    heads = _number(file.metadata, "attention.head_count", 1)
    gqa = heads // max(1, _number(file.metadata, "attention.head_count_kv", heads))
    tied = "output.weight" not in file.tensors
    types = {}
    for name, info in file.tensors.items():
        if not is_quantizable(name, info.shape):
            types[name] = info.type
            continue
        kind = tensor_type(wish.mix, name, info.shape, layers=layers, gqa=gqa, tied=tied, imatrix=wish.imatrix)
        types[name] = _wished(name, info.shape[-1], kind, base, wish)
    return types


def _wished(name: str, row: int, by_mix: str, base: str, wish: Wish) -> str:
    if wish.embedding_type is not None and name == "token_embd.weight":
        return type_named(wish.embedding_type)
    if wish.output_type is not None and name == "output.weight":
        return type_named(wish.output_type)
    if base in ("F32", "F16", "BF16"):
        return base
    found = next((kind for pattern, kind in wish.overrides if re.search(pattern, name)), None)
    if found is not None:
        return fitting(type_named(found), row)
    return fitting(base, row) if wish.pure else by_mix
