"""Streams: the parts joined are the whole, whole characters only, nothing of a stop string."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.text.streaming import StopStrings, StreamDecoder
from qjax.text.tokenizer import Tokenizer

with_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tiny(spm: Callable[..., dict[str, Any]]) -> Tokenizer:
    return Tokenizer.from_gguf(spm({"\u2581": -1.0, "a": -2.0, "\u2581a": -3.0, "é": -4.0}))


@with_fixtures
@given(ids=st.lists(st.integers(0, 263)), skip_special=st.booleans(), continuing=st.booleans())
def test_pieces_join_to_what_decode_gives(
    tiny: Tokenizer, ids: list[int], skip_special: bool, continuing: bool
) -> None:
    stream = StreamDecoder(tiny, skip_special, continuing=continuing)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tiny.decode(ids, skip_special, continuing=continuing)


@with_fixtures
@given(st.text(max_size=20).map(lambda text: text.encode("utf-8", "ignore").decode()))
def test_no_half_character_is_ever_given(tiny: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tiny)
    ids = tiny.encode(text)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == text.replace("\u2581", " ")
    assert stream.finish() == ""


def test_a_character_comes_with_its_last_byte(tiny: Tokenizer) -> None:
    stream = StreamDecoder(tiny)
    assert [stream.push(i) for i in tiny.encode("a€")] == ["a", "", "", "€"]
    half = StreamDecoder(tiny)
    assert half.push(3 + 0xE2) == ""
    assert half.finish() == "\ufffd"


def test_text_that_goes_on_keeps_its_blank(tiny: Tokenizer) -> None:
    blank_a = tiny.vocabulary.tokens.index("\u2581a")
    assert StreamDecoder(tiny).push(blank_a) == "a"
    assert StreamDecoder(tiny, continuing=True).push(blank_a) == " a"


stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@settings(max_examples=400)
@given(stops, st.lists(st.text("abc", max_size=6), max_size=12))
def test_text_up_to_the_first_stop_string(stops: list[str], parts: list[str]) -> None:
    whole = "".join(parts)
    first = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
    stream = StopStrings(stops)
    shown = ""
    for part in parts:
        out, stopped = stream.push(part)
        shown += out
        assert whole.startswith(shown)
        assert stopped == stream.stopped
    shown += stream.finish()
    assert shown == whole[:first]
    assert stream.stopped == (first < len(whole))


@given(stops, st.text("abcd", max_size=30))
def test_no_more_is_held_back_than_may_be_a_stop_string(stops: list[str], text: str) -> None:
    stream = StopStrings(stops)
    shown = ""
    for seen, letter in enumerate(text, 1):
        out, stopped = stream.push(letter)
        shown += out
        if stopped:
            break
        held = text[len(shown) : seen]
        assert not held or any(stop.startswith(held) or stop in held for stop in stops)
        assert len(held) <= 2 * max(map(len, stops), default=0)


def test_after_a_stop_string_nothing_comes() -> None:
    stream = StopStrings(["END"])
    assert stream.push("one E") == ("one ", False)
    assert stream.push("ND two") == ("", True)
    assert stream.push("three") == ("", True)
    assert stream.finish() == ""


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(QjaxError, match="stop string is empty"):
        StopStrings(["a", ""])
