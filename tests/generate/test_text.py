"""Tokens to text while they come: ends at end tokens and stop strings, never half a character."""

from collections.abc import Callable
from typing import Any

import pytest

from qjax.errors import QjaxError
from qjax.generate import Greedy, Piece, stream_text
from qjax.pipeline import one_stage

Saying = Callable[[list[int]], Greedy]


def letters(made: Any, text: str) -> list[int]:
    """One id a character, none joined."""
    tokens = made.tokenizer.vocabulary.tokens
    return [tokens.index("▁" if c == " " else c) for c in text]


def pieces(made: Any, sampler: Greedy, n: int, **options: Any) -> list[Piece]:
    return list(
        stream_text(one_stage(made.params, made.config), made.tokenizer, [1], max_tokens=n, sampler=sampler, **options)
    )


def text(got: list[Piece]) -> str:
    return "".join(piece.text for piece in got)


def ids(got: list[Piece]) -> list[int]:
    return [piece.id for piece in got if piece.id is not None]


def test_each_token_is_a_piece(made: Any, saying: Saying) -> None:
    said = letters(made, "the fox")
    got = pieces(made, saying(said), len(said))
    assert [piece.text for piece in got] == [*"the fox", ""]
    assert ids(got) == said
    assert got[-1] == Piece("", None)


def test_an_end_token_ends_and_is_not_text(made: Any, saying: Saying) -> None:
    end = made.tokenizer.eos_id
    assert end in made.tokenizer.eog_ids
    said = letters(made, "ab")
    got = pieces(made, saying([*said, end, *letters(made, "cd")]), 5)
    assert text(got) == "ab"
    assert ids(got) == said


@pytest.mark.parametrize(
    ("stop", "shown", "tokens"),
    [
        (["de"], "abc", 5),
        (["e", "cd"], "ab", 4),
        (["a"], "", 1),
        (["xyz", "h"], "abcdefg", 8),
        (["hi"], "abcdefgh", 8),
        ([], "abcdefgh", 8),
        # One string, not its characters.
        ("de", "abc", 5),
    ],
)
def test_a_stop_string_ends_and_is_not_text(
    made: Any, saying: Saying, stop: str | list[str], shown: str, tokens: int
) -> None:
    got = pieces(made, saying(letters(made, "abcdefgh")), 8, stop=stop)
    assert text(got) == shown
    assert len(ids(got)) == tokens


def test_text_held_back_for_a_stop_string_comes_before_an_end_token(made: Any, saying: Saying) -> None:
    got = pieces(made, saying([*letters(made, "abc"), made.tokenizer.eos_id]), 9, stop=["cd"])
    assert text(got) == "abc"


def test_characters_come_whole(made: Any, saying: Saying) -> None:
    euro = [3 + byte for byte in "€".encode()]
    got = pieces(made, saying([*euro, *letters(made, "a")]), 4)
    assert [piece.text for piece in got] == ["", "", "€", "a", ""]
    half = pieces(made, saying(euro), 2)
    assert [piece.text for piece in half] == ["", "", "\ufffd"]


def test_nothing_is_computed_for_an_empty_stop_string(made: Any, saying: Saying) -> None:
    with pytest.raises(QjaxError, match="stop string is empty"):
        pieces(made, saying(letters(made, "ab")), 2, stop=[""])
    with pytest.raises(QjaxError, match="stop string is empty"):
        pieces(made, saying(letters(made, "ab")), 2, stop="")
