"""SentencePiece merging against a slow, plain transcription of the algorithm."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.text.sentencepiece import SentencePieceEncoder
from qjax.text.tokenizer import Tokenizer


def merge_slowly(text: str, scores: Mapping[str, float]) -> list[str]:
    """Join, again and again, the neighbours whose join has the best score, the left-most of equals."""
    symbols = list(text)
    while True:
        best = None
        for i, join in enumerate(a + b for a, b in pairwise(symbols)):
            if join in scores and (best is None or scores[join] > scores[symbols[best] + symbols[best + 1]]):
                best = i
        if best is None:
            return symbols
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]


pieces = st.text("ab\u2581", min_size=1, max_size=6)
# Few distinct scores: many ties.
vocabularies = st.dictionaries(pieces, st.integers(-3, 0).map(float), max_size=25)


@settings(max_examples=300)
@given(vocabularies, st.text("ab\u2581", max_size=40))
def test_merging_equals_the_plain_algorithm(pieces: dict[str, float], text: str) -> None:
    pieces = {"a": 0.0, "b": 0.0, "\u2581": 0.0} | pieces
    ids = {piece: i for i, piece in enumerate(pieces)}
    encoder = SentencePieceEncoder(ids, list(pieces.values()), None)
    assert encoder.encode(text) == [ids[symbol] for symbol in merge_slowly(text, pieces)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("etaonirsh \n.,<|>'\u4e2d\u00e9\U0001f600\u200d", max_size=60))
def test_a_real_vocabulary_equals_the_plain_algorithm(real_tokenizer: Callable[[str], Tokenizer], text: str) -> None:
    tokenizer = real_tokenizer("llama-spm")
    vocabulary = tokenizer.vocabulary
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    ids = vocabulary.token_ids
    expected: list[int] = []
    for symbol in merge_slowly("\u2581" + text.replace(" ", "\u2581"), scores) if text else []:
        expected.extend([ids[symbol]] if symbol in ids else [ids[f"<0x{b:02X}>"] for b in symbol.encode()])
    assert tokenizer.encode(text) == expected


def test_of_equal_scores_the_left_most_is_merged_whatever_its_halves() -> None:
    # No ranked list of pairs can say this: "aba" is joined at the left end from either halves.
    pieces = {"a": 0.0, "b": 0.0, "ab": -1.0, "ba": -2.0, "aba": -3.0, "x": 0.0}
    ids = {piece: i for i, piece in enumerate(pieces)}
    encoder = SentencePieceEncoder(ids, list(pieces.values()), None)
    assert encoder.encode("ababa") == [ids[symbol] for symbol in merge_slowly("ababa", pieces)]


def test_a_character_without_token_becomes_bytes_or_unknown_or_an_error() -> None:
    ids = {"a": 0, "<0xC3>": 1, "<0xA9>": 2}
    assert SentencePieceEncoder(ids, [0.0] * 3, None).encode("aé") == [0, 1, 2]
    assert SentencePieceEncoder({"a": 0}, [0.0] * 2, 1).encode("aé") == [0, 1, 1]
    with pytest.raises(QjaxError, match="no token for 'é'"):
        SentencePieceEncoder({"a": 0}, [0.0], None).encode("é")


def test_a_long_piece_takes_no_time() -> None:
    pieces = {"a" * 2**n: -float(n) for n in range(5)}
    encoder = SentencePieceEncoder({piece: i for i, piece in enumerate(pieces)}, list(pieces.values()), None)
    assert encoder.encode("a" * 20_000) == [4] * 1250
