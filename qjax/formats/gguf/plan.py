"""Which type each tensor of a file gets when it is quantized: a mix, and what the user wants otherwise.

Precedence, as llama-quantize has it: `embedding_type` and `output_type`; then the first of `overrides` that is found in
the name; then the mix (or its base type alone, if `pure`). What rows do not allow falls back to another type.
Source: `llama_tensor_get_type` and `tensor_type_fallback` of llama.cpp's src/llama-quant.cpp.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.gguf.mixes import Mix, mix_of, pattern
from qjax.formats.gguf.places import Place, Places, Traits, in_order, is_quantizable, role_of, traits_of
from qjax.formats.gguf.types import GGML_TYPES, type_named
from qjax.formats.source import Source
from qjax.formats.yaml_file import YAML_ENDINGS, read_yaml

# What a type becomes for rows that its blocks do not divide; F16 where that fits no better.
FALLBACK: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")
    | dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)
# llama-quantize has rules of its own for some of their tensors, which no mix holds.
_SPECIAL_ARCHS = ("falcon", "glm5-next", "bailingmoe3")


class Wish(NamedTuple):
    """What is asked for.

    mix: the name of a mix, or a YAML file with one. pure: its base type for every matrix. overrides: (regular
    expression, ggml type), the first that is found in a tensor's name decides. imatrix: importances are known (some
    mixes go by that).
    """

    mix: str
    pure: bool = False
    output_type: str | None = None
    embedding_type: str | None = None
    overrides: Sequence[tuple[str, str]] = ()
    imatrix: bool = False


def override(text: str) -> tuple[str, str]:
    """(regular expression, type) of "REGEX=TYPE".

    Raises:
      QjaxError: no such form, a broken expression, or an unknown type.
    """
    expression, sign, kind = text.rpartition("=")
    if not sign or not expression:
        raise QjaxError(f"expected REGEX=TYPE such as 'ffn_down=q6_k', got {text!r}")
    try:
        pattern(expression)
        return expression, type_named(kind)
    except QjaxError as error:
        raise QjaxError(f"in {text!r}: {error}") from None


def overrides(given: Sequence[str | Path]) -> list[tuple[str, str]]:
    """Those of texts REGEX=TYPE, and of files (paths) of them: apart by spaces or lines, or a YAML list `tensor_types`.

    Raises:
      QjaxError: a file cannot be read, or a text is no override.
    """
    lists = ([override(item)] if isinstance(item, str) else _overrides_in(item) for item in given)
    return list(itertools.chain.from_iterable(lists))


def _overrides_in(path: Path) -> list[tuple[str, str]]:
    if path.suffix.lower() in YAML_ENDINGS:
        texts = read_yaml(path).get("tensor_types")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise QjaxError(f"{path}: expected a key 'tensor_types' with a list of REGEX=TYPE")
    else:
        try:
            texts = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise QjaxError(f"{path}: expected a readable text file of REGEX=TYPE, got {error}") from error
    try:
        return [override(text) for text in texts]
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}") from None


def _fits(kind: str, row: int) -> bool:
    return row % GGML_TYPES[kind].block_size == 0


def fitting(kind: str, row: int) -> str:
    """The type, or what llama-quantize puts in its place for rows that its blocks do not divide."""
    return next((some for some in (kind, FALLBACK.get(kind, "F16")) if _fits(some, row)), "F16")


def _by_mix(mix: Mix, name: str, place: Place, row: int) -> str:
    """Type by the rules, before the row length is considered."""
    found = next((rule.type for rule in mix.rules if rule.fits(name, place)), None)
    if found is None and place.role == "output":
        return mix.output if _fits(mix.base, row) else "Q8_0"
    return mix.base if found is None else found


def types_of(shapes: Mapping[str, tuple[int, ...]], model: Traits, wish: Wish) -> dict[str, str]:
    """The type of each tensor that a mix decides over; vectors, norms and the like are left out.

    Args:
      shapes: of all tensors of the model, by name, in numpy order (last = in_features).

    Raises:
      QjaxError: an unknown mix or type, or rows that the type of output or embedding does not allow.
    """
    mix = mix_of(wish.mix)
    wanted = {
        role: type_named(kind)
        for role, kind in (("output", wish.output_type), ("token_embd", wish.embedding_type))
        if kind is not None
    }
    by_name = [(pattern(expression), type_named(kind)) for expression, kind in wish.overrides]
    places = Places(shapes, model, wish.imatrix)
    types = {}
    for name in in_order(shapes):
        shape = shapes[name]
        if not is_quantizable(name, shape):
            continue
        found = next((kind for expression, kind in by_name if expression.search(name)), None)
        role = role_of(name)
        # Of the two embeddings, that of each layer is the larger: its own override goes before what is said of both.
        if role in wanted and (found is None or name != "per_layer_token_embd.weight"):
            if not _fits(wanted[role], shape[-1]):
                size = GGML_TYPES[wanted[role]].block_size
                raise QjaxError(f"{name}: its rows of {shape[-1]} are no whole {wanted[role]} blocks of {size}")
            types[name] = wanted[role]
            continue
        if found is None and not wish.pure:
            place = places.next(name, shape)
            tied = place.role == "output" and role != "output"
            found = wanted["output"] if tied and "output" in wanted else _by_mix(mix, name, place, shape[-1])
        types[name] = fitting(found or mix.base, shape[-1])
    return types


def plan(file: Source, wish: Wish) -> dict[str, str]:
    """The type of each tensor in the quantized file; vectors, norms and the like keep theirs.

    Warns of an override that is found in no name, and of architectures that llama-quantize makes exceptions for.

    Raises:
      QjaxError: see `types_of`.
    """
    model = traits_of(file.metadata)
    types = types_of({name: info.shape for name, info in file.tensors.items()}, model, wish)
    for expression, kind in wish.overrides:
        if not any(map(pattern(expression).search, types)):
            warnings.warn(
                f"{expression}={kind}: found in the name of no matrix of {file.path}", QjaxWarning, stacklevel=3
            )
    if model.arch in _SPECIAL_ARCHS:
        warnings.warn(
            f"{file.path}: llama-quantize makes exceptions for models of {model.arch}; types may differ from its",
            QjaxWarning,
            stacklevel=3,
        )
    return {name: types.get(name, info.type) for name, info in file.tensors.items()}
