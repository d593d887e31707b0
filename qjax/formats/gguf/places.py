"""What a mix can go by: a tensor's role, where it stands among its kind, and what model it belongs to.

Source: `tensor_get_category`, `tensor_allows_quantization` and the conditions of `llama_tensor_get_type_impl` in
llama.cpp's src/llama-quant.cpp.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.errors import QjaxError

# The first whose expression is found in a tensor's name is its role.
_ROLES = (
    ("output", r"^output\.weight$"),
    ("token_embd", r"^(per_layer_)?token_embd\.weight$"),
    ("attn_v", r"attn_(qkv|kv_b|v)\.weight"),
    ("attn_k", r"attn_k\.weight"),
    ("attn_q", r"attn_q\.weight"),
    ("attn_output", r"attn_output\.weight"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
    ("other", ""),
)
ROLES = tuple(role for role, _ in _ROLES)
_OF_FFN = ("ffn_up", "ffn_gate", "ffn_down")

# No mix decides over these: norms, gates, tables, small kernels and projections of all architectures.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)
# Architectures whose layers llama.cpp knows as a model of 70B: how many they are. A Llama's heads must be grouped too.
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


class Traits(NamedTuple):
    """What mixes go by in a model: its architecture, layers, attention heads, and experts (0: none)."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def gqa(self) -> int:
        """Query heads to a key and value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        if self.arch == "llama" and (self.heads == self.kv_heads or self.experts == 8):
            return False
        return _LAYERS_OF_70B.get(self.arch) == self.layers


def traits_of(metadata: Mapping[str, Any]) -> Traits:
    """The traits that a file's metadata give; what is missing counts as one layer's dense model without groups."""
    arch = metadata.get("general.architecture")

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{arch}.{key}")
        # Some models have as many heads in each layer as suits it: llama.cpp goes by the first.
        if isinstance(value, np.ndarray) and value.size:
            value = value[0].item()
        return value if isinstance(value, int) else default

    heads = number("attention.head_count", 1)
    return Traits(
        arch if isinstance(arch, str) else "",
        number("block_count", 0),
        heads,
        number("attention.head_count_kv", heads),
        number("expert_count", 0),
    )


class Place(NamedTuple):
    """Where a tensor stands.

    role: one of ROLES; an embedding that serves as output matrix has that role. layer: of how many `layers` (-1: of
    none), as llama-quantize counts them: where there are experts, and for a role that it does not count, the number in
    the name; else how many tensors of the role came before. nth: always that.
    """

    role: str
    layer: int
    layers: int
    nth: int
    stacked: bool
    imatrix: bool
    model: Traits


Condition = Callable[[Place], bool]


def _first(p: Place, n: int) -> bool:
    return 0 <= p.layer < n


def _more_bits(p: Place, _: int) -> bool:
    eighth = p.layers // 8
    return p.layer >= 0 and (p.layer < eighth or p.layer >= 7 * p.layers // 8 or (p.layer - eighth) % 3 == 2)


# How a condition is written, and whether it holds for a place and the number in it.
_CONDITIONS: tuple[tuple[str, Callable[[Place, int], bool]], ...] = (
    ("first N", _first),
    ("last N", lambda p, n: p.layer >= max(0, p.layers - n)),
    ("first 1/N", lambda p, n: _first(p, p.layers // n)),
    ("last 1/N", lambda p, n: p.layer >= 0 and p.layer >= (n - 1) * p.layers // n),
    ("first 1/N of its kind", lambda p, n: p.nth < p.layers // n),
    ("more bits", _more_bits),
    ("gqa >= N", lambda p, n: p.model.gqa >= n),
    ("experts == N", lambda p, n: p.model.experts == n),
    ("experts >= N", lambda p, n: p.model.experts >= n),
    ("imatrix", lambda p, _: p.imatrix),
    ("stacked", lambda p, _: p.stacked),
    ("70b", lambda p, _: p.model.is_70b),
)


def condition(text: str) -> Condition:
    """The condition of a mix's `when`.

    Raises:
      QjaxError: it is none of the known ones; lists them.
    """
    plain = text.removeprefix("not ")
    for form, holds in _CONDITIONS:
        found = re.fullmatch(re.escape(form).replace("N", r"([1-9]\d{0,5})"), plain)
        if found is not None:
            n = int(found[1]) if found.groups() else 0
            return lambda place: holds(place, n) == (plain == text)
    known = ", ".join(form for form, _ in _CONDITIONS)
    raise QjaxError(f"unknown condition {text!r}; known are {known}, each with 'not' before it or without")


# Each tensor is asked for more than once, and searched for ten expressions.
@functools.lru_cache(maxsize=1 << 14)
def role_of(name: str) -> str:
    """One of ROLES."""
    return next(role for role, pattern in _ROLES if re.search(pattern, name))


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mix decides over this tensor: not over vectors, norms, experts' gates and the like."""
    # Leading dimensions of one do not make a matrix.
    is_matrix = any(length > 1 for length in shape[:-1])
    return is_matrix and name.endswith("weight") and _KEPT.search(name) is None


def _number_in(name: str) -> int:
    # No more digits than any model needs: a damaged name may have thousands.
    found = re.match(r"blk\.([0-9]{1,9})\.", name)
    return int(found[1]) if found else -1


def in_order(names: Iterable[str]) -> list[str]:
    """As llama-quantize goes through tensors: what is of no layer, then layer by layer."""
    return sorted(names, key=lambda name: (_number_in(name), name))


class Places:
    """Where a model's tensors stand; asked `in_order`, for each that a mix decides over."""

    def __init__(self, names: Collection[str], model: Traits, imatrix: bool) -> None:
        self._model, self._imatrix = model, imatrix
        self._tied = "output.weight" not in names
        self._values = sum(role_of(name) == "attn_v" for name in names)
        self._seen = dict.fromkeys(ROLES, 0)

    def next(self, name: str, shape: tuple[int, ...]) -> Place:
        """The place of this tensor, whose turn it is."""
        role = role_of(name)
        nth = self._seen[role]
        self._seen[role] += 1
        counted = role == "attn_v" or (role in _OF_FFN and self._model.experts <= 1)
        return Place(
            role="output" if role == "token_embd" and self._tied else role,
            layer=nth if counted else _number_in(name),
            layers=self._values if role == "attn_v" else self._model.layers,
            nth=nth,
            stacked=len(shape) > 2 and shape[-3] > 1,
            imatrix=self._imatrix,
            model=self._model,
        )
