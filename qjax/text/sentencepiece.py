"""SentencePiece BPE: always merge the neighbours whose join has the best score, the left-most of equals.

Source: `llm_tokenizer_spm_session` in llama.cpp's src/llama-vocab.cpp, after bpe_model.cc of SentencePiece.

This is not the BPE of the `tokenizers` library, which ranks *pairs* in a list: SentencePiece ranks the *joins*,
and among joins of equal score (the same token made of other halves, or two tokens with one score) takes the
left-most in the text, an order that no list of pairs can state. So the merging is done here, and made fast by
cutting the text where no token can span two characters: the pieces between are short, and recur.
"""

import heapq
from collections.abc import Mapping, Sequence
from functools import lru_cache

from qjax.errors import QjaxError

_CACHED_PIECES = 1 << 16
_LONGEST_CACHED = 48


class SentencePieceEncoder:
    """Text to ids by scores, with `<0xNN>` tokens for characters that the vocabulary lacks."""

    def __init__(self, token_ids: Mapping[str, int], scores: Sequence[float], unk_id: int | None) -> None:
        """Args: the tokens that text may become, the score of every id, and what stands for a missing byte."""
        self._ids = dict(token_ids)
        self._ranks = {text: -scores[i] for text, i in token_ids.items()}
        self._unk_id = unk_id
        self._bridges = {text[i : i + 2] for text in token_ids for i in range(len(text) - 1)}
        self._encode_recurring = lru_cache(_CACHED_PIECES)(self._encode_piece)

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose blanks are already U+2581.

        Raises:
            QjaxError: the text has a character for which the vocabulary has neither bytes nor an unknown token.
        """
        ids: list[int] = []
        bridges, start = self._bridges, 0
        for end in [i for i in range(1, len(text)) if text[i - 1 : i + 1] not in bridges] + [len(text)]:
            piece = text[start:end]
            known = self._encode_recurring if len(piece) <= _LONGEST_CACHED else self._encode_piece
            ids.extend(known(piece))
            start = end
        return ids

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        ids: list[int] = []
        for symbol in self._merge(piece):
            if symbol in self._ids:
                ids.append(self._ids[symbol])
            else:
                ids.extend(self._byte(byte, symbol) for byte in symbol.encode())
        return tuple(ids)

    def _byte(self, byte: int, symbol: str) -> int:
        i = self._ids.get(f"<0x{byte:02X}>", self._unk_id)
        if i is None:
            raise QjaxError(f"the vocabulary has no token for {symbol!r}: neither bytes nor an unknown token")
        return i

    def _merge(self, piece: str) -> list[str]:
        symbols, ranks = list(piece), self._ranks
        n = len(symbols)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        queue: list[tuple[float, int, int, int]] = []

        def push(left: int, right: int) -> None:
            join = symbols[left] + symbols[right]
            if join in ranks:
                heapq.heappush(queue, (ranks[join], left, right, len(join)))

        for i in range(n - 1):
            push(i, i + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            # A symbol that merged since is empty or longer: then this entry is outdated.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[left] < n:
                before[after[left]] = left
                push(left, after[left])
            if before[left] >= 0:
                push(before[left], left)
        return [symbol for symbol in symbols if symbol]
