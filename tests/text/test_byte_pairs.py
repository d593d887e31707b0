"""Byte-level BPE: the byte alphabet, and the corners that the library leaves to us."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from qjax.text.byte_pairs import BYTE_TO_LETTER, letters_to_bytes
from qjax.text.tokenizer import Tokenizer


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode(text)]


def test_the_alphabet_is_the_library_s() -> None:
    assert set(BYTE_TO_LETTER.values()) == set(ByteLevel.alphabet())


@given(st.binary(max_size=40))
def test_letters_stand_for_bytes(data: bytes) -> None:
    assert letters_to_bytes("".join(BYTE_TO_LETTER[byte] for byte in data)) == data


def test_letters_outside_the_alphabet_stand_for_themselves() -> None:
    assert letters_to_bytes("a \u4e2dĠ") == "a \u4e2d ".encode()


def test_merges_go_by_rank_and_the_first_of_equal_lines_counts(bpe: Callable[..., dict[str, Any]]) -> None:
    metadata = bpe("b c", "a b", "ab c")
    metadata["tokenizer.ggml.merges"].append("b c")
    assert texts(Tokenizer.from_gguf(metadata), "abc") == ["a", "bc"]


def test_ignored_merges_take_whole_words(bpe: Callable[..., dict[str, Any]]) -> None:
    metadata = bpe("b c", "a b", "ab c")
    assert texts(Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"}), "abc") == ["abc"]


def test_a_byte_without_token_is_dropped_and_keeps_its_neighbours_apart(
    bpe: Callable[..., dict[str, Any]],
) -> None:
    metadata = bpe("a b")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("!")] = "<gone>"
    assert texts(Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "superbpe"}), "a!b") == ["a", "b"]


def test_blanks_as_u2581_bytes_by_name_and_newline_runs(spm: Callable[..., dict[str, Any]]) -> None:
    metadata = spm({"a": 0.0, "\u2581": 0.0, "\u2581a": 0.0, "\n": 0.0, "\n\n": 0.0})
    metadata |= {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": ["\u2581 a"]}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.add_bos
    assert texts(tokenizer, "a a\n\né") == ["a", "\u2581a", "\n\n", "<0xC3>", "<0xA9>"]
    assert texts(tokenizer, "\n\n\n") == ["\n", "\n", "\n"]
    assert tokenizer.decode(tokenizer.encode(" a a\n\né")) == " a a\n\né"
