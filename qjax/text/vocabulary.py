"""The tokenizer's part of a GGUF file's metadata, checked.

Keys and defaults: ggml/docs/gguf.md and `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.errors import FormatError, QjaxWarning, UnsupportedError
from qjax.text.pretokenizers import PreTokenizer, pre_tokenizer
from qjax.text.special_tokens import TokenType, settle_special_tokens

_KEY = "tokenizer.ggml."
_MODELS = ("llama", "gpt2", "gemma4")
_ID_KEYS = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",),
    "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid": ("fim_mid_token_id", "middle_token_id"),
    "fim_pad": ("fim_pad_token_id",),
    "fim_rep": ("fim_rep_token_id",),
    "fim_sep": ("fim_sep_token_id",),
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """All that turning text into tokens and back needs to know; what `read_vocabulary` has checked.

    Attributes:
        model: "llama" (SentencePiece BPE) or "gpt2" (BPE by merges; gemma4 too).
        tokens: each id's text, as in the file; bytes that are no UTF-8 as lone surrogates.
        types: each id's TokenType, with llama.cpp's corrections.
        scores: each id's score (model "llama"), else empty.
        merges: pairs of tokens, the first merged first (model "gpt2"), else empty.
        pre: how text is cut into words (model "gpt2"), else None.
        bos_id, eos_id, unk_id: None where there is no such token.
        eog_ids: the tokens that end a generation.
        add_bos: whether a prompt starts with BOS.
        add_space_prefix: whether a blank is put before text (model "llama").
        lstrip_ids, rstrip_ids: special tokens that swallow the blanks before or after them.
        chat_template: the jinja source, or None.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    pre: PreTokenizer | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_space_prefix: bool
    lstrip_ids: frozenset[int]
    rstrip_ids: frozenset[int]
    chat_template: str | None

    @property
    def token_ids(self) -> dict[str, int]:
        """Token text to id; of equal texts the last, as in llama.cpp."""
        return {text: i for i, text in enumerate(self.tokens)}


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read and check the `tokenizer.*` keys of a GGUF file.

    Args:
        metadata: key to Python value; arrays of numbers as numpy arrays, arrays of strings as list[str].

    Raises:
        FormatError: a key is missing, of the wrong type or length, or names a token that is not there.
        UnsupportedError: a tokenizer model or pre-tokenizer that qjax does not know.
    """
    model = _get(metadata, "model", str)
    if model is None:
        raise FormatError(f"{_KEY}model is missing: the file holds no tokenizer")
    if model not in _MODELS:
        known = ", ".join(_MODELS)
        raise UnsupportedError(f"{_KEY}model: tokenizer {model[:80]!r} is not supported; known are {known}")
    spm = model == "llama"
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise FormatError(f"{_KEY}tokens is missing or empty: expected a list of strings")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    token_ids = {text: i for i, text in enumerate(tokens)}

    ids = _named_ids(metadata, len(tokens), defaults={"bos": 1, "eos": 2, "unk": 0} if spm else {})
    types = _types(metadata, tokens, spm)
    eog_ids = settle_special_tokens(token_ids, types, ids)
    pre = None if spm else _pre_tokenizer(metadata, model)
    if model == "gemma4" or (pre is not None and pre.newline_runs):
        add_bos = True  # Files exist that say otherwise, and are wrong.
    else:
        add_bos = _get(metadata, "add_bos_token", bool, default=spm or (pre is not None and pre.add_bos))
    lstrip_ids, rstrip_ids = _stripping(metadata, token_ids, types)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise FormatError(f"tokenizer.chat_template: expected a string, got {type(template).__name__}")
    return Vocabulary(
        model="llama" if spm else "gpt2",
        tokens=tokens,
        types=types,
        scores=_scores(metadata, len(tokens)) if spm else [],
        merges=[] if spm else _merges(metadata, token_ids),
        pre=pre,
        bos_id=ids.get("bos"),
        eos_id=ids.get("eos"),
        unk_id=ids.get("unk"),
        eog_ids=eog_ids,
        add_bos=add_bos and "bos" in ids,
        add_space_prefix=spm and _get(metadata, "add_space_prefix", bool, default=True),
        lstrip_ids=lstrip_ids,
        rstrip_ids=rstrip_ids,
        chat_template=template,
    )


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(_KEY + name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{_KEY}{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(_KEY + name)
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise FormatError(f"{_KEY}{name}: expected a list of strings, got {type(values).__name__}")
    return values


def _numbers(metadata: Mapping[str, Any], name: str, kinds: str, count: int) -> list[Any] | None:
    """The first `count` numbers of an array whose numpy kind is one of `kinds`; None where there is no array."""
    value = metadata.get(_KEY + name)
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise FormatError(f"{_KEY}{name}: expected an array of numbers, got {got}")
    if len(value) < count:
        raise FormatError(f"{_KEY}{name}: expected {count} entries, one a token, got {len(value)}")
    return value[:count].tolist()


def _named_ids(metadata: Mapping[str, Any], n_tokens: int, defaults: Mapping[str, int]) -> dict[str, int]:
    ids = {role: i for role, i in defaults.items() if i < n_tokens}
    for role, names in _ID_KEYS.items():
        for name in names:
            value = _get(metadata, name, int)
            if value is None:
                continue
            if not 0 <= value < n_tokens:
                raise FormatError(f"{_KEY}{name}: token {value} is outside the vocabulary of {n_tokens}")
            ids[role] = value
    return ids


def _types(metadata: Mapping[str, Any], tokens: list[str], spm: bool) -> list[int]:
    types = _numbers(metadata, "token_type", "iu", len(tokens))
    if types is None:
        # Files without types still mean bytes by these names, in vocabularies that have byte tokens.
        return [TokenType.BYTE if spm and _BYTE_TOKEN.fullmatch(t) else TokenType.NORMAL for t in tokens]
    for text, kind in zip(tokens, types, strict=True):
        if kind == TokenType.BYTE and not _BYTE_TOKEN.fullmatch(text):
            raise FormatError(f"{_KEY}tokens: byte token {text[:80]!r} is not of the form <0xNN>")
    return types


def _scores(metadata: Mapping[str, Any], n_tokens: int) -> list[float]:
    scores = _numbers(metadata, "scores", "fiu", n_tokens)
    if scores is None:
        raise FormatError(f"{_KEY}scores is missing: a 'llama' vocabulary merges by them")
    scores = [float(score) for score in scores]
    if any(math.isnan(score) for score in scores):
        raise FormatError(f"{_KEY}scores: expected numbers, got NaN")
    return scores


def _merges(metadata: Mapping[str, Any], token_ids: Mapping[str, int]) -> list[tuple[str, str]]:
    lines = _strings(metadata, "merges")
    if not lines and _get(metadata, "pre", str) != "kimi-k2":
        raise FormatError(f"{_KEY}merges is missing or empty: a 'gpt2' vocabulary merges by them")
    merges: dict[tuple[str, str], None] = {}
    for line in lines:
        # The first blank may be the left token itself.
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in token_ids or right not in token_ids or left + right not in token_ids:
            raise FormatError(f"{_KEY}merges: {line[:80]!r} does not name two tokens whose join is a token")
        merges.setdefault((left, right))
    return list(merges)


def _pre_tokenizer(metadata: Mapping[str, Any], model: str) -> PreTokenizer:
    if model == "gemma4":
        return pre_tokenizer("gemma4")
    name = _get(metadata, "pre", str, default="")
    if not name:
        warnings.warn(
            f"{_KEY}pre is missing: using 'default', which may cut words unlike the model's own tokenizer",
            QjaxWarning,
            stacklevel=4,
        )
    return pre_tokenizer(name or "default")


def _stripping(
    metadata: Mapping[str, Any], token_ids: Mapping[str, int], types: list[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Special tokens that swallow blanks: GGUF does not say, llama.cpp goes by the names of models."""
    pre = _get(metadata, "pre", str)
    name = str(metadata.get("general.name", "")).lower()
    if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code"):
        return frozenset({token_ids["<mask>"]} if "<mask>" in token_ids else ()), frozenset()
    if "phi-3" in name or "phi3" in name:
        special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        strips = {i for i, kind in enumerate(types) if kind in special} | {token_ids.get("</s>")}
        strips -= {token_ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")} | {None}
        return frozenset(), frozenset(i for i in strips if i is not None)
    if "modern-bert" in name and "[MASK]" in token_ids:
        return frozenset({token_ids["[MASK]"]}), frozenset()
    return frozenset(), frozenset()
