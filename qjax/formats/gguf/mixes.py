"""llama.cpp's mixes: which tensor of a model gets which type, as a table.

A mix such as Q4_K_M names a base type and the tensors that get another one, by role and by layer. Source:
`llama_tensor_get_type_impl`, `tensor_type_fallback` and `tensor_allows_quantization` of llama.cpp's
src/llama-quant.cpp, for the dense models that qjax knows (no experts, no fused attn_qkv).
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from qjax.errors import QjaxError
from qjax.formats.gguf.types import GGML_TYPES


class Place(NamedTuple):
    """Where a tensor stands: its layer (-1 for none) of how many, in what kind of model."""

    layer: int
    layers: int
    gqa: int
    imatrix: bool


When = Callable[[Place], bool]


def always(_: Place) -> bool:
    return True


def more_bits(p: Place) -> bool:
    """The first and last eighth of the layers and every third between them."""
    eighth = p.layers // 8
    return p.layer < eighth or p.layer >= 7 * p.layers // 8 or (p.layer - eighth) % 3 == 2


def first_eighth(p: Place) -> bool:
    return p.layer < p.layers // 8


def first_sixteenth(p: Place) -> bool:
    return p.layer < p.layers // 16


def first_2(p: Place) -> bool:
    return p.layer < 2


def first_4(p: Place) -> bool:
    return p.layer < 4


def middle(p: Place) -> bool:
    """All but the first and last eighth of the layers."""
    return p.layers // 8 <= p.layer < 7 * p.layers // 8


def shared_heads(p: Place) -> bool:
    """Four or more query heads to a value head: attn_v is small, and many depend on it."""
    return p.gqa >= 4


def no_imatrix(p: Place) -> bool:
    return not p.imatrix


def first_eighth_with_imatrix(p: Place) -> bool:
    return p.imatrix and first_eighth(p)


def first_eighth_no_imatrix(p: Place) -> bool:
    return not p.imatrix and first_eighth(p)


class Rule(NamedTuple):
    """Tensors of this role get this type, where `when` holds. Of a mix's rules the first that fits decides."""

    role: str
    type: str
    when: When = always


class Mix(NamedTuple):
    """A row of the table.

    base: the type of what no rule names. file_type: its number as `general.file_type`. output: the type of the output
    matrix, or of the embedding that serves as one. more_v_at_70b: attn_v of a 70B model, which 8 heads share, gets
    Q5_K in place of Q3_K or Q4_K.
    """

    base: str
    file_type: int
    rules: tuple[Rule, ...] = ()
    output: str = "Q6_K"
    more_v_at_70b: bool = True


_MORE_Q6 = (Rule("attn_v", "Q6_K", more_bits), Rule("ffn_down", "Q6_K", more_bits))
_IQ4 = (Rule("attn_v", "Q5_K", shared_heads), Rule("ffn_down", "Q5_K", first_eighth_no_imatrix))
_TERNARY = (Rule("token_embd", "Q4_K"),)


def _lattice_2(base: str, file_type: int, embedding: str, better: str, attn_output: str | None = None) -> Mix:
    """The 1- and 2-bit IQ mixes, alike but for their better types."""
    rules = [
        Rule("token_embd", embedding),
        Rule("attn_v", "Q4_K", shared_heads),
        Rule("attn_v", better),
        Rule("ffn_down", better, first_eighth),
    ]
    if attn_output is not None:
        rules.append(Rule("attn_output", attn_output))
    return Mix(base, file_type, tuple(rules), output="Q5_K", more_v_at_70b=False)


MIXES: Mapping[str, Mix] = MappingProxyType(
    {
        "f32": Mix("F32", 0),
        "f16": Mix("F16", 1),
        "bf16": Mix("BF16", 32),
        "q4_0": Mix("Q4_0", 2, (Rule("ffn_down", "Q4_1", first_eighth_with_imatrix),)),
        "q4_1": Mix("Q4_1", 3),
        "q5_0": Mix("Q5_0", 8, (Rule("ffn_down", "Q5_1", first_eighth_with_imatrix),)),
        "q5_1": Mix("Q5_1", 9),
        "q8_0": Mix("Q8_0", 7, output="Q8_0"),
        "q2_k": Mix(
            "Q2_K",
            10,
            (
                Rule("attn_v", "Q4_K", shared_heads),
                Rule("attn_v", "Q3_K"),
                Rule("ffn_down", "Q3_K"),
                Rule("attn_output", "Q3_K"),
            ),
        ),
        "q2_k_s": Mix("Q2_K", 21, (Rule("attn_v", "Q4_K", shared_heads), Rule("ffn_down", "Q4_K", first_eighth))),
        "q3_k_s": Mix("Q3_K", 11),
        "q3_k_m": Mix(
            "Q3_K",
            12,
            (
                Rule("attn_v", "Q5_K", first_2),
                Rule("attn_v", "Q4_K"),
                Rule("ffn_down", "Q5_K", first_sixteenth),
                Rule("ffn_down", "Q4_K"),
                Rule("attn_output", "Q4_K"),
            ),
        ),
        "q3_k_l": Mix("Q3_K", 13, tuple(Rule(role, "Q5_K") for role in ("attn_v", "ffn_down", "attn_output"))),
        "q4_k_s": Mix("Q4_K", 14, (Rule("attn_v", "Q5_K", first_4), Rule("ffn_down", "Q5_K", first_eighth))),
        "q4_k_m": Mix("Q4_K", 15, _MORE_Q6),
        "q5_k_s": Mix("Q5_K", 16),
        "q5_k_m": Mix("Q5_K", 17, _MORE_Q6),
        "q6_k": Mix("Q6_K", 18),
        "iq1_s": _lattice_2("IQ1_S", 24, embedding="Q2_K", better="Q2_K", attn_output="IQ2_XXS"),
        "iq1_m": _lattice_2("IQ1_M", 31, embedding="Q2_K", better="Q2_K", attn_output="IQ2_XXS"),
        "iq2_xxs": _lattice_2("IQ2_XXS", 19, embedding="Q2_K", better="Q2_K"),
        "iq2_xs": _lattice_2("IQ2_XS", 20, embedding="Q2_K", better="Q2_K"),
        "iq2_s": _lattice_2("IQ2_XS", 28, embedding="IQ3_S", better="IQ3_S", attn_output="IQ3_S"),
        "iq2_m": _lattice_2("IQ2_S", 29, embedding="IQ3_S", better="IQ3_S", attn_output="IQ3_S"),
        "iq3_xxs": Mix(
            "IQ3_XXS",
            23,
            (
                Rule("token_embd", "IQ3_S"),
                Rule("attn_v", "Q4_K", shared_heads),
                Rule("attn_v", "IQ3_S", no_imatrix),
                Rule("attn_k", "IQ2_S"),
                Rule("attn_q", "IQ2_S"),
                Rule("ffn_down", "Q4_K", first_eighth_no_imatrix),
                Rule("ffn_down", "Q3_K", no_imatrix),
                Rule("attn_output", "IQ3_S"),
            ),
            output="Q5_K",
        ),
        "iq3_xs": Mix(
            "IQ3_S",
            22,
            (
                Rule("attn_v", "Q4_K", shared_heads),
                Rule("attn_k", "IQ3_XXS"),
                Rule("attn_q", "IQ3_XXS"),
                Rule("ffn_gate", "IQ3_XXS", middle),
                Rule("ffn_up", "IQ3_XXS", middle),
            ),
        ),
        "iq3_s": Mix("IQ3_S", 26, (Rule("attn_v", "Q4_K", shared_heads),)),
        "iq3_m": Mix(
            "IQ3_S",
            27,
            (Rule("attn_v", "Q4_K"), Rule("ffn_down", "Q4_K", first_eighth), Rule("attn_output", "Q4_K")),
        ),
        "iq4_nl": Mix("IQ4_NL", 25, _IQ4),
        "iq4_xs": Mix("IQ4_XS", 30, _IQ4),
        "tq1_0": Mix("TQ1_0", 36, _TERNARY),
        "tq2_0": Mix("TQ2_0", 37, _TERNARY),
    }
)

# llama-quantize takes these names too.
ALIASES: Mapping[str, str] = MappingProxyType({"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"})

# What a type becomes for rows that its blocks do not divide; F16 where that fits no better.
FALLBACK: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")
    | dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)

_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")
_70B_LAYERS = 80


def is_mix(name: str) -> bool:
    """Whether there is a mix of this name."""
    return ALIASES.get(name.lower(), name.lower()) in MIXES


def mix_of(name: str) -> Mix:
    """The mix of this name ("q4_k_m", "Q4_K_M", "q4_k").

    Raises:
        QjaxError: no such mix; lists the known ones.
    """
    key = name.lower()
    found = MIXES.get(ALIASES.get(key, key))
    if found is None:
        raise QjaxError(f"type {name!r} is not known, expected one of {', '.join(MIXES)}")
    return found


def file_type(mix: str) -> int:
    """The number that stands as `general.file_type` in a file of this mix; QjaxError for an unknown one."""
    return mix_of(mix).file_type


def _fits(type_name: str, row: int) -> bool:
    return row % GGML_TYPES[type_name].block_size == 0


def fitting(type_name: str, row: int) -> str:
    """The type, or what llama-quantize puts in its place for rows that its blocks do not divide."""
    return next((kind for kind in (type_name, FALLBACK.get(type_name, "F16")) if _fits(kind, row)), "F16")


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mix decides over this tensor: not over vectors, norms and expert gates."""
    found = _NAME.fullmatch(name)
    return found is not None and len(shape) >= 2 and not found[2].endswith("_norm") and found[2] != "ffn_gate_inp"


def _by_rules(mix: Mix, role: str, row: int, place: Place, tied: bool) -> str:
    """Type by role and layer, before the row length is considered."""
    if role == "output" or (tied and role == "token_embd"):
        return mix.output if _fits(mix.base, row) else "Q8_0"
    chosen = next((rule.type for rule in mix.rules if rule.role == role and rule.when(place)), mix.base)
    is_70b = place.layers == _70B_LAYERS and place.gqa > 1
    if role == "attn_v" and is_70b and mix.more_v_at_70b and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def tensor_type(
    mix: str, name: str, shape: tuple[int, ...], *, layers: int, gqa: int, tied: bool, imatrix: bool = False
) -> str:
    """ggml's type of one tensor in a file that llama-quantize makes from float weights.

    Args:
        mix: a key of MIXES or ALIASES, in any case.
        name: the tensor's GGUF name, such as "blk.3.attn_v.weight".
        shape: in numpy order, last = in_features.
        layers: how many the model has.
        gqa: attention heads to a key/value head.
        tied: the model has no output matrix, its embedding serves as one.
        imatrix: llama-quantize is given an importance matrix.

    Returns:
        A key of GGML_TYPES; "F32" for what is never quantized: vectors, norms, expert gates.

    Raises:
        QjaxError: unknown mix.
    """
    table = mix_of(mix)
    found = _NAME.fullmatch(name)
    if found is None or not is_quantizable(name, shape):
        return "F32"
    if table.base in ("F32", "F16", "BF16"):
        return table.base
    row = shape[-1]
    place = Place(-1 if found[1] is None else int(found[1]), layers, gqa, imatrix)
    return fitting(_by_rules(table, found[2], row, place, tied), row)
