"""The tokenizer files of a folder as GGUF's `tokenizer.*` keys, as llama.cpp's converter writes them.

Sources: `set_vocab` of conversion/llama.py and `TextModel` of conversion/base.py in llama.cpp; what of it gguf's own
package holds (special tokens, merges, chat templates) is asked there.
"""

import logging
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from qjax.errors import FormatError, QjaxWarning, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface import sentencepiece
from qjax.formats.huggingface.json_files import read_if_there, read_object
from qjax.formats.huggingface.pretokenizers import pre_tokenizer_name

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTROL, _USER_DEFINED, _UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
# Of a token that nothing is merged to, and of one that is not there.
_NO_SCORE, _ABSENT_SCORE = -1000.0, -10000.0
# The first models of Meta's code family have this many tokens, and these at fixed places.
_CODE_LLAMA_TOKENS, _CODE_LLAMA_IDS = 32016, {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
# Granite's and SmolLM's: they put no BOS in front, whatever their files say.
_NO_BOS_TOKENS = 49152


class Tokens(NamedTuple):
    """One entry an id; no scores where merges decide."""

    texts: list[str]
    types: list[int]
    scores: list[float]


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, arch: str, vocab_size: int) -> None:
    """Add the keys of the tokenizer to what `writer` holds; a warning if the folder has none.

    Args:
        vocab_size: number of rows of the embedding; ids without token are named [PADn].

    Raises:
        FormatError: a file is damaged, or has tokens beyond `vocab_size`.
        UnsupportedError: a kind of tokenizer, or a pre-tokenizer, that is not known.
    """
    config = read_if_there(folder / "tokenizer_config.json")
    if arch == "llama" and isinstance(config.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(config["add_prefix_space"])
    if (folder / "tokenizer.model").is_file():
        _add_llama(writer, folder, _by_pieces(folder, config, vocab_size))
    elif (folder / "tokenizer.json").is_file():
        _add_by_json(writer, folder, vocab_size)
    else:
        warnings.warn(
            f"{folder}: neither tokenizer.model nor tokenizer.json there: only token ids go in and out",
            QjaxWarning,
            stacklevel=2,
        )
        writer.add_tokenizer_model("none")
        return
    if arch == "llama" and vocab_size == _CODE_LLAMA_TOKENS:
        for role, i in _CODE_LLAMA_IDS.items():
            getattr(writer, f"add_{role}_token_id")(i)
    if arch == "llama" and vocab_size == _NO_BOS_TOKENS:
        writer.kv_data[0].pop(gguf.Keys.Tokenizer.ADD_BOS, None)
        writer.add_add_bos_token(False)


def _add_by_json(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    path = folder / "tokenizer.json"
    tokenizer = read_object(path)
    model, decoder = tokenizer.get("model"), tokenizer.get("decoder")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedError(f"{path}: a tokenizer of type {shown(str(kind))}; known is BPE (and tokenizer.model)")
    texts, added = _texts(path, tokenizer, vocab_size)
    if model.get("byte_fallback") is True and isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        _add_llama(writer, folder, _by_merges(model, texts, added, vocab_size))
        return
    name = pre_tokenizer_name(tokenizer, str(path))
    types: list[int] = [gguf.TokenType.NORMAL if i in texts else _UNUSED for i in range(vocab_size)]
    for i, special in added.items():
        texts[i], types[i] = _settled(texts[i], special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(types)
    _add_special(writer, folder, tokenizer, vocab_size, merges=True)


def _add_llama(writer: gguf.GGUFWriter, folder: Path, tokens: Tokens) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens.texts)
    writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.types)
    _add_special(writer, folder, read_if_there(folder / "tokenizer.json"), len(tokens.texts), merges=False)


def _add_special(
    writer: gguf.GGUFWriter, folder: Path, tokenizer: dict[str, Any], n_tokens: int, *, merges: bool
) -> None:
    """Ids of special tokens, whether BOS and EOS are added, merges, chat templates."""
    # Its remarks are on models that it does not quite understand, such as BERTs.
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=n_tokens)
        processor = tokenizer.get("post_processor") or {}
        kinds = {part.get("type") for part in processor.get("processors", [processor])}
        if "ByteLevel" in kinds:
            # By itself it adds nothing, which older versions of the package do not see.
            templates = kinds & {"TemplateProcessing", "RobertaProcessing"}
            nothing = {"bos": False, "eos": False}
            special.add_special_token = nothing | (special.add_special_token if templates else {})
        special.add_to_gguf(writer, quiet=True)
    # The package reads the files as they come: broken ones make it raise whatever Python raises.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{folder}: its tokenizer's files are damaged ({reason}): download them again") from error


def _by_pieces(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokens:
    """The tokens of tokenizer.model, then those that added_tokens.json and tokenizer_config.json put over them."""
    tokens = Tokens([f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size, [_ABSENT_SCORE] * vocab_size)
    pieces = sentencepiece.read_pieces(folder / "tokenizer.model")
    for i, piece in enumerate(pieces[:vocab_size]):
        tokens.texts[i], tokens.scores[i] = piece.text, piece.score
        # What is user-defined there is found in text by being merged to, as any other token.
        tokens.types[i] = sentencepiece.NORMAL if piece.kind == sentencepiece.USER_DEFINED else piece.kind

    def put(what: Path, i: Any, text: Any, kind: int) -> None:
        if not isinstance(i, int) or not isinstance(text, str):
            raise FormatError(f"{what}: expected ids of tokens, got {shown(str(i))} for {shown(str(text))}")
        if 0 <= i < vocab_size:
            tokens.texts[i], tokens.types[i], tokens.scores[i] = text, kind, _NO_SCORE
        else:
            warnings.warn(
                f"{what}: token {i}, {shown(text)}, is beyond the {vocab_size} of the model", QjaxWarning, stacklevel=3
            )

    path = folder / "added_tokens.json"
    for text, i in read_if_there(path).items():
        put(path, i, text, _USER_DEFINED)
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(f"{path}: added token {shown(i)} has no content")
        put(
            path,
            int(i) if i.isdecimal() and len(i) < 10 else i,
            *_settled(token["content"], token.get("special") is True),
        )
    return tokens


def _by_merges(model: dict[str, Any], texts: dict[int, str], added: dict[int, bool], vocab_size: int) -> Tokens:
    """A SentencePiece vocabulary of which only tokenizer.json is left; scores in the order of its merges.

    llama.cpp's converter gives all tokens one score, by which text is cut another way than the model was taught.
    """
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model.get("merges") or []):
        scores.setdefault("".join(merge) if isinstance(merge, list) else str(merge).replace(" ", ""), -float(rank))

    def kind(i: int) -> int:
        if i not in texts:
            return _UNUSED
        if _BYTE_TOKEN.fullmatch(texts[i]):
            return gguf.TokenType.BYTE
        if added.get(i):
            return _CONTROL
        return _USER_DEFINED if i in added and texts[i] not in model["vocab"] else gguf.TokenType.NORMAL

    return Tokens(
        [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        [kind(i) for i in range(vocab_size)],
        [scores.get(texts.get(i, ""), _NO_SCORE) for i in range(vocab_size)],
    )


def _texts(path: Path, tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[int, str], dict[int, bool]]:
    """Id -> text of all tokens, and id -> whether it is special of the added ones."""
    texts: dict[int, str] = {}
    added: dict[int, bool] = {}

    def put(i: Any, text: Any) -> None:
        if type(i) is not int or not isinstance(text, str) or not 0 <= i < vocab_size:
            what = f"token {shown(str(text))} has the id {shown(str(i))}"
            raise FormatError(f"{path}: {what}, expected 0 to {vocab_size - 1}, by vocab_size in config.json")
        texts[i] = text

    for text, i in tokenizer["model"]["vocab"].items():
        put(i, text)
    for token in tokenizer.get("added_tokens") or []:
        if not isinstance(token, dict):
            raise FormatError(f"{path}: an added token is {shown(str(token))}, expected an object")
        put(token.get("id"), token.get("content"))
        added[token["id"]] = token.get("special") is True
    return texts, added


def _settled(text: str, special: bool) -> tuple[str, int]:
    """Text and type of an added token: many are special by their look alone."""
    looks = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    )
    if special or looks:
        return text, _CONTROL
    return text.replace("▁", " "), _USER_DEFINED
