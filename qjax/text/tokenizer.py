"""The tokenizer of a GGUF file: text to token ids and back, as llama.cpp does it.

Source: `llama_vocab::impl::tokenize`, `tokenizer_st_partition` and `token_to_piece` in llama.cpp's
src/llama-vocab.cpp.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from qjax.errors import QjaxError
from qjax.text.byte_pairs import BytePairEncoder, letters_to_bytes
from qjax.text.sentencepiece import SentencePieceEncoder
from qjax.text.special_tokens import TokenType
from qjax.text.vocabulary import Vocabulary, read_vocabulary

_BLANK = "\u2581"
_C_SPACE = " \t\n\v\f\r"
_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)
_APART = (*_CONTROL, TokenType.USER_DEFINED)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocabulary: what it was made from.
        vocab_size: the number of ids.
        bos_id, eos_id: the tokens that begin and end a text, or None.
        eog_ids: every token after which a generation is over.
        add_bos: whether the model wants BOS before a prompt; `encode` leaves that to its caller.
        chat_template: the jinja source of the model's chat format, or None.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary: Vocabulary = vocabulary
        self.vocab_size: int = len(vocabulary.tokens)
        self.bos_id: int | None = vocabulary.bos_id
        self.eos_id: int | None = vocabulary.eos_id
        self.eog_ids: frozenset[int] = vocabulary.eog_ids
        self.add_bos: bool = vocabulary.add_bos
        self.chat_template: str | None = vocabulary.chat_template

        tokens, types = vocabulary.tokens, vocabulary.types
        token_ids = vocabulary.token_ids
        if vocabulary.pre is None:
            # Text never becomes a control token, not even by merging up to one.
            text_ids = {text: i for text, i in token_ids.items() if types[i] not in _CONTROL}
            self._encoder = SentencePieceEncoder(text_ids, vocabulary.scores, vocabulary.unk_id)
            self._escape = True
        else:
            self._encoder = BytePairEncoder(token_ids, vocabulary.merges, vocabulary.pre, len(tokens))
            self._escape = not vocabulary.pre.byte_level
        self._special = sorted(
            (i for i, kind in enumerate(types) if kind in _APART),
            key=lambda i: len(tokens[i].encode("utf-8", "surrogateescape")),
            reverse=True,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that a GGUF file's metadata describe.

        Args:
            metadata: key to Python value; arrays of numbers as numpy arrays, arrays of strings as list[str].

        Raises:
            FormatError: the metadata contradict themselves.
            UnsupportedError: a kind of tokenizer that qjax does not know.
        """
        return cls(read_vocabulary(metadata))

    @property
    def first_id(self) -> int | None:
        """What every text that the model sees begins with: BOS, or None where the model wants none."""
        return self.bos_id if self.add_bos else None

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; lone surrogates count as U+FFFD.
            add_bos: put BOS first, if the vocabulary has one.
            parse_special: read the text of control tokens ("<|im_start|>") as these tokens. Never for text of
                strangers. User-defined tokens are read always.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        prefix = _BLANK if self.vocabulary.add_space_prefix else ""
        after_special = True
        for part in self._split_special(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if self._escape:
                part = (prefix if after_special else "") + part.replace(" ", _BLANK)
            ids.extend(self._encoder.encode(part))
            after_special = False
        return ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True, *, continuing: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        The blank that `encode` puts before text, at the start and after each special token, is taken away.

        Args:
            ids: token ids.
            skip_special: leave control tokens out rather than write their text.
            continuing: the ids follow others in mid-text, so that a blank at their start is text.

        Raises:
            QjaxError: an id outside the vocabulary.
        """
        pieces, fresh = [], not continuing
        for i in map(operator.index, ids):
            pieces.append(self.piece(i, skip_special, fresh=fresh))
            fresh = self.is_special(i)
        return b"".join(pieces).decode("utf-8", "replace")

    def is_special(self, i: int) -> bool:
        """Whether a token is control, unknown or user-defined: text after it starts afresh."""
        return self.vocabulary.types[i] in _APART

    def piece(self, i: int, skip_special: bool = True, *, fresh: bool = False) -> bytes:
        """The bytes that one token stands for; none for unused tokens, and for control tokens if skipped.

        Args:
            i: the token.
            skip_special: leave control tokens out rather than write their text.
            fresh: the token starts a text or follows a special token, where `encode` may have put a blank.

        Raises:
            QjaxError: an id outside the vocabulary.
        """
        if not 0 <= i < self.vocab_size:
            raise QjaxError(f"token id {i} is outside the vocabulary of {self.vocab_size} tokens")
        kind, text = self.vocabulary.types[i], self.vocabulary.tokens[i]
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if kind == TokenType.NORMAL:
            if not self._escape:
                return letters_to_bytes(text)
            text = text.replace(_BLANK, " ")
            if fresh and self.vocabulary.add_space_prefix:
                text = text.removeprefix(" ")
        elif kind != TokenType.USER_DEFINED and (skip_special or kind not in _CONTROL):
            return b""
        return text.encode("utf-8", "surrogateescape")

    def _split_special(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut the text at special tokens: each longest first, wherever it stands, as llama.cpp does."""
        parts: list[str | int] = [text] if text else []
        vocabulary = self.vocabulary
        for i in self._special:
            token = vocabulary.tokens[i]
            if token not in text or not (parse_special or vocabulary.types[i] == TokenType.USER_DEFINED):
                continue
            cut: list[str | int] = []
            for part in parts:
                cut.extend(self._cut(part, token, i) if isinstance(part, str) else [part])
            parts = cut
        return parts

    def _cut(self, text: str, token: str, i: int) -> list[str | int]:
        parts: list[str | int] = []
        *lefts, last = text.split(token)
        for left in lefts:
            if parts and i in self.vocabulary.rstrip_ids:
                left = left.lstrip(_C_SPACE)
            if i in self.vocabulary.lstrip_ids:
                left = left.rstrip(_C_SPACE)
            parts.extend([left, i] if left else [i])
        if parts and i in self.vocabulary.rstrip_ids:
            last = last.lstrip(_C_SPACE)
        return [*parts, last] if last else parts
