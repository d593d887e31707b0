"""Tokenizer files of a model that has none: made from GGUF's metadata, where nothing is lost.

A SentencePiece vocabulary ("llama") becomes tokenizer.model, which has the same pieces, scores and types; one of merges
("gpt2") tokenizer.json, if its pre-tokenizer's steps are known.
"""

import json
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import gguf

from qjax.errors import QjaxWarning
from qjax.formats.huggingface.pretokenizers import pre_tokenizer_json

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_NORMAL, _UNKNOWN, _CONTROL = gguf.TokenType.NORMAL, gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL
_USER_DEFINED, _UNUSED = gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
_TEMPLATE = "tokenizer.chat_template"
_BPE = 2
# Of a token that was added to a vocabulary.
_ADDED_SCORE = -1000.0


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Contents by names of files; with a warning that says what is missing, none where they cannot be made."""
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    config = lambda: json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False).encode()
    if model == "llama" and tokens and "tokenizer.ggml.scores" in metadata:
        return {"tokenizer.model": _sentencepiece(metadata), "tokenizer_config.json": config()}
    if model == "gpt2" and tokens:
        steps = pre_tokenizer_json(str(metadata.get("tokenizer.ggml.pre", "")))
        if steps is not None:
            made = json.dumps(_by_merges(metadata, *steps), indent=1, ensure_ascii=False).encode()
            return {"tokenizer.json": made, "tokenizer_config.json": config()}
    kind = f"{model!r}" + (f" ({metadata.get('tokenizer.ggml.pre')!r})" if model == "gpt2" else "")
    warnings.warn(
        f"tokenizer.json and tokenizer_config.json are missing: GGUF's tokenizer {kind} cannot be put in them without "
        "loss; copy them from the model that the file was made from",
        QjaxWarning,
        stacklevel=2,
    )
    return {}


def _types(metadata: Mapping[str, Any]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    return [int(_NORMAL)] * len(metadata["tokenizer.ggml.tokens"]) if types is None else [int(t) for t in types]


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    llama = metadata.get("tokenizer.ggml.model") == "llama"
    found: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer" if llama else "PreTrainedTokenizerFast"}
    for role, name in _ROLES.items():
        i = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            found[name] = tokens[i]
    for key in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{key}" in metadata:
            found[key] = bool(metadata[f"tokenizer.ggml.{key}"])
    if llama:
        found |= {"legacy": True, "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", True))}
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    found |= {"model_max_length": context, "clean_up_tokenization_spaces": False}
    templates = {key.removeprefix(_TEMPLATE).lstrip("."): text for key, text in metadata.items() if _is_template(key)}
    if templates.keys() == {""}:
        found["chat_template"] = templates[""]
    elif templates:
        found["chat_template"] = [{"name": name or "default", "template": t} for name, t in templates.items()]
    if llama:
        # What was added to SentencePiece's own.
        scores, decoder = metadata["tokenizer.ggml.scores"], {}
        for i, (text, kind, score) in enumerate(zip(tokens, _types(metadata), scores, strict=True)):
            if kind == _USER_DEFINED or (kind == _CONTROL and score == _ADDED_SCORE):
                decoder[str(i)] = _added(text, special=kind == _CONTROL)
        found["added_tokens_decoder"] = decoder
    return found


def _is_template(key: str) -> bool:
    return key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")


def _added(text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **flags, "special": special}


def _by_merges(metadata: Mapping[str, Any], steps: dict[str, Any], ignore_merges: bool) -> dict[str, Any]:
    """The object of a tokenizer.json."""
    tokens, types = metadata["tokenizer.ggml.tokens"], _types(metadata)
    apart = {i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
    merges = [
        line[: line.find(" ", 1)] + " " + line[line.find(" ", 1) + 1 :] for line in metadata["tokenizer.ggml.merges"]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    post: dict[str, Any] = {**byte_level, "trim_offsets": False}
    if metadata.get("tokenizer.ggml.add_bos_token") and isinstance(bos, int):
        text = tokens[bos]
        first = {"SpecialToken": {"id": text, "type_id": 0}}
        pair = [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
        template = {
            "type": "TemplateProcessing",
            "single": pair[:2],
            "pair": pair,
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
        }
        post = {"type": "Sequence", "processors": [post, template]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(tokens[i], special=types[i] == _CONTROL)} for i in sorted(apart)],
        "normalizer": None,
        "pre_tokenizer": steps,
        "post_processor": post,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {text: i for i, text in enumerate(tokens) if i not in apart and types[i] != _UNUSED},
            "merges": merges,
        },
    }


def _sentencepiece(metadata: Mapping[str, Any]) -> bytes:
    """A SentencePiece model of the tokens; field numbers are those of sentencepiece_model.proto."""
    tokens, types = metadata["tokenizer.ggml.tokens"], _types(metadata)
    pieces = []
    for text, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True):
        piece = _text(1, text.encode("utf-8", "surrogateescape")) + _key(2, 5) + struct.pack("<f", float(score))
        pieces.append(_text(1, piece + (b"" if kind == _NORMAL else _number(3, kind))))
    fallback = any(kind == gguf.TokenType.BYTE for kind in types)
    trainer = _number(3, _BPE) + _number(4, len(tokens)) + _number(35, fallback)
    for field, role, usual in ((40, "unknown", 0), (41, "bos", 1), (42, "eos", 2), (43, "padding", -1)):
        trainer += _number(field, metadata.get(f"tokenizer.ggml.{role}_token_id", usual))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer = _text(1, b"identity") + _number(3, prefix) + _number(4, False) + _number(5, True)
    return b"".join([*pieces, _text(2, trainer), _text(3, normalizer)])


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _text(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(int(value) % (1 << 64))


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])
