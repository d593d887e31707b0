"""Metadata that contradict themselves, and what is read where they say nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import FormatError, QjaxError, QjaxWarning, UnsupportedError
from qjax.text.special_tokens import TokenType
from qjax.text.tokenizer import Tokenizer
from qjax.text.vocabulary import read_vocabulary

SPM_FAULTS = [
    ({"tokens": None}, "tokens is missing"),
    ({"tokens": []}, "tokens is missing or empty"),
    ({"tokens": np.zeros(3, np.int32)}, "tokens: expected a list of strings"),
    ({"tokens": ["a", 1]}, "tokens: expected a list of strings"),
    ({"scores": None}, "scores is missing"),
    ({"scores": np.zeros(3, np.float32)}, r"scores: expected 261 entries, one a token, got 3"),
    ({"scores": ["a"]}, "scores: expected an array of numbers"),
    ({"scores": np.full(261, np.nan, np.float32)}, "scores: expected numbers, got NaN"),
    ({"token_type": np.zeros(3, np.int32)}, "token_type: expected 261 entries"),
    ({"token_type": np.zeros(261, np.float32)}, "token_type: expected an array of numbers"),
    ({"token_type": np.full(261, 6, np.int32)}, "is not of the form <0xNN>"),
    ({"bos_token_id": 261}, "bos_token_id: token 261 is outside the vocabulary of 261"),
    ({"eos_token_id": -1}, "eos_token_id: token -1 is outside"),
    ({"eos_token_id": "2"}, "eos_token_id: expected int, got str"),
    ({"eos_token_id": True}, "eos_token_id: expected int, got bool"),
    ({"add_bos_token": 1}, "add_bos_token: expected bool, got int"),
    ({"model": 3}, "model: expected str, got int"),
    ({"model": None}, "model is missing"),
]
BPE_FAULTS = [
    ({"merges": None}, "merges is missing"),
    ({"merges": []}, "merges is missing"),
    ({"merges": ["a b", "zz y"]}, "merges: 'zz y' does not name two tokens"),
    ({"merges": ["b a"]}, "merges: 'b a' does not name two tokens whose join is a token"),
    ({"merges": ["ab"]}, "merges: 'ab' does not name two tokens"),
    ({"merges": [""]}, "merges: '' does not name two tokens"),
    ({"merges": 3}, "merges: expected a list of strings, got int"),
    ({"pre": 3}, "pre: expected str, got int"),
]


def broken(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(("changes", "message"), SPM_FAULTS)
def test_faults_of_sentencepiece(spm: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.from_gguf(broken(spm({"a": -1.0}), changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), BPE_FAULTS)
def test_faults_of_byte_pairs(bpe: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.from_gguf(broken(bpe("a b"), changes))
    assert "\n" not in str(caught.value)


KEYS = (
    *("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eot_token_id", "add_bos_token"),
    *("add_space_prefix", "prefix_token_id"),
)
numbers = st.integers(-2, 300) | st.floats()
junk = (
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=4)
    | st.sampled_from(["llama", "gpt2", "gemma4", "tekken"])
    | st.lists(st.text(max_size=3), max_size=400)
    | st.lists(numbers, max_size=400).map(np.array)
    | st.integers(0, 7).map(lambda i: np.full(300, i, np.int32))
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), junk, min_size=1, max_size=3), spm_or_bpe=st.booleans())
def test_junk_ends_in_our_errors_only(
    spm: Callable[..., dict[str, Any]],
    bpe: Callable[..., dict[str, Any]],
    changes: dict[str, Any],
    spm_or_bpe: bool,
) -> None:
    metadata = broken(spm({"a": -1.0}) if spm_or_bpe else bpe("a b"), changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QjaxWarning)
        try:
            tokenizer = Tokenizer.from_gguf(metadata)
            tokenizer.decode(tokenizer.encode("a b<s>", add_bos=True, parse_special=True))
            message = ""
        except QjaxError as error:
            message = str(error)
    assert "\n" not in message


def test_a_chat_template_is_text(spm: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(FormatError, match="chat_template: expected a string, got int"):
        Tokenizer.from_gguf(spm({}) | {"tokenizer.chat_template": 3})


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "none", "whitespace"])
def test_other_models_are_unsupported(spm: Callable[..., dict[str, Any]], model: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{model}' is not supported; known are llama, gpt2"):
        Tokenizer.from_gguf(spm({}, model=model))


def test_a_missing_pre_tokenizer_is_the_default_with_a_warning(bpe: Callable[..., dict[str, Any]]) -> None:
    with pytest.warns(QjaxWarning, match="pre is missing: using 'default'"):
        tokenizer = Tokenizer.from_gguf(broken(bpe("1 2"), {"pre": None}))
    assert tokenizer.vocabulary.pre == Tokenizer.from_gguf(bpe("1 2", pre="default")).vocabulary.pre


def test_defaults_of_sentencepiece(spm: Callable[..., dict[str, Any]]) -> None:
    metadata = spm({"a": -1.0})
    for name in ("bos_token_id", "eos_token_id", "token_type"):
        del metadata[f"tokenizer.ggml.{name}"]
    vocabulary = read_vocabulary(metadata)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)
    assert vocabulary.add_bos
    assert vocabulary.add_space_prefix
    assert vocabulary.types[3] == TokenType.BYTE


def test_bos_of_byte_pairs(bpe: Callable[..., dict[str, Any]]) -> None:
    assert not Tokenizer.from_gguf(bpe("a b", pre="gpt-2", bos_token_id=1)).add_bos
    assert Tokenizer.from_gguf(bpe("a b", pre="llama-bpe", bos_token_id=1)).add_bos
    assert not Tokenizer.from_gguf(bpe("a b", pre="llama-bpe", bos_token_id=1, add_bos_token=False)).add_bos
    # No token to put first.
    assert not Tokenizer.from_gguf(bpe("a b", pre="llama-bpe")).add_bos


def test_empty_tokens_and_tokens_that_are_no_utf_8(
    spm: Callable[..., dict[str, Any]], bpe: Callable[..., dict[str, Any]]
) -> None:
    for metadata in (spm({"a": 0.0, "\u2581": 0.0, "": 0.0, "b\udcff": 0.0}), bpe("a b")):
        metadata["tokenizer.ggml.tokens"][-1] = "b\udcff"
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
        assert tokenizer.decode([tokenizer.vocab_size - 1]) == "b\ufffd"
