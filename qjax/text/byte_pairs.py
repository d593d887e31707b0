"""BPE by a list of merges, as GPT-2 and most models since use it, run by the `tokenizers` library.

Source: `llm_tokenizer_bpe_session` in llama.cpp's src/llama-vocab.cpp.
"""

import re
from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from qjax.text.pretokenizers import PreTokenizer

_NEWLINES = re.compile(r"(\n+)")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_LETTER = _byte_alphabet()
LETTER_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_LETTER.items()}
_TO_LATIN_1 = str.maketrans({letter: chr(byte) for letter, byte in LETTER_TO_BYTE.items()})


def letters_to_bytes(text: str) -> bytes:
    """The bytes that a token of the byte alphabet stands for; other letters stand for their own UTF-8."""
    if all(letter in LETTER_TO_BYTE for letter in text):
        return text.translate(_TO_LATIN_1).encode("latin-1")
    pieces = [bytes([LETTER_TO_BYTE[c]]) if c in LETTER_TO_BYTE else c.encode("utf-8", "surrogateescape") for c in text]
    return b"".join(pieces)


class BytePairEncoder:
    """Text to ids: cut into words by the pre-tokenizer, then merged pair by pair."""

    def __init__(
        self, token_ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer, n_tokens: int
    ) -> None:
        """Args: the tokens, the merges in order, how words are cut, and the number of ids."""
        # Tokens that are no UTF-8 (lone surrogates here) are never made from text.
        ids = {text: i for text, i in token_ids.items() if not _SURROGATE.search(text)}
        # A byte without token is dropped after merging, not before: till then it keeps its neighbours apart.
        stand_ins = [letter for letter in LETTER_TO_BYTE if pre.byte_level and letter not in ids]
        ids |= {letter: n_tokens + n for n, letter in enumerate(stand_ins)}
        self._n_tokens = n_tokens
        self._newlines = {} if not pre.newline_runs else {t: i for t, i in ids.items() if not t.strip("\n")}
        self._bpe = tokenizers.Tokenizer(
            models.BPE(
                vocab=ids,
                merges=list(merges),
                ignore_merges=pre.ignore_merges,
                byte_fallback=not pre.byte_level,
            )
        )
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        if pre.byte_level:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; where the pre-tokenizer is not byte-level, its blanks are already U+2581."""
        if not self._newlines:
            return self._encode(text)
        ids: list[int] = []
        for run in _NEWLINES.split(text):
            ids.extend([self._newlines[run]] if run in self._newlines else self._encode(run))
        return ids

    def _encode(self, text: str) -> list[int]:
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i < self._n_tokens]
