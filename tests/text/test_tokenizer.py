"""Tokenizers against llama.cpp's own vectors, against Hugging Face's tokenizer, and as laws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.formats.gguf.container import open_gguf
from qjax.text.tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
anything = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def read_cases(vocabulary: Path) -> list[tuple[str, list[int]]]:
    """The texts and ids of a vocabulary's `.inp` and `.out`, as llama.cpp's test-tokenizer-0 reads them."""
    # newline="": a text may hold \r.
    with Path(f"{vocabulary}.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = Path(f"{vocabulary}.out").read_text().splitlines()
    assert len(texts) == len(lines)
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


def vocabularies_with_cases(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("ggml-vocab-*.gguf")) if Path(f"{path}.inp").exists()]


def test_llama_cpp_vectors(vocab_folder: Path, real_tokenizer: Callable[[str], Tokenizer]) -> None:
    seen = 0
    for path in vocabularies_with_cases(vocab_folder):
        tokenizer = real_tokenizer(path.stem.removeprefix("ggml-vocab-"))
        for text, ids in read_cases(path):
            assert tokenizer.encode(text) == ids, (path.name, text)
            assert tokenizer.decode(ids) == text, (path.name, text)
            seen += 1
    assert seen >= 46


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "llama-bpe", "qwen2", "deepseek-coder"])
@anything
@given(st.text(max_size=60).filter(lambda text: "\u2581" not in text))
def test_decode_inverts_encode(real_tokenizer: Callable[[str], Tokenizer], name: str, text: str) -> None:
    tokenizer = real_tokenizer(name)
    text = text.encode("utf-8", "ignore").decode()
    for parse_special in (False, True):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids, skip_special=False) == text


def test_equals_the_hugging_face_tokenizer(interop: Path) -> None:
    ours = Tokenizer.from_gguf(open_gguf(interop / "tiny-f16.gguf").metadata)
    theirs = tokenizers.Tokenizer.from_file(str(interop / "hf-float" / "tokenizer.json"))
    text = (interop / "heldout.txt").read_text(encoding="utf-8")[:40_000]
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text
    assert ours.vocab_size == theirs.get_vocab_size()


def test_what_the_files_say_of_bos_and_ends(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    llama2 = real_tokenizer("llama-spm")
    assert (llama2.bos_id, llama2.eos_id, llama2.add_bos, llama2.eog_ids) == (1, 2, True, frozenset({2}))
    assert llama2.encode("Hello", add_bos=True) == [1, 15043]
    assert llama2.encode("", add_bos=True) == [1]
    # The file says nothing of BOS: the pre-tokenizer llama-bpe implies it.
    llama3 = real_tokenizer("llama-bpe")
    assert llama3.add_bos
    assert {128001, 128009} <= llama3.eog_ids
    gpt2 = real_tokenizer("gpt-2")
    assert not gpt2.add_bos
    assert gpt2.eog_ids == frozenset({50256})


def test_special_tokens(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    tokenizer = real_tokenizer("llama-bpe")
    text = "<|begin_of_text|>Hi<|eot_id|>"
    ids = tokenizer.encode(text, parse_special=True)
    assert ids == [128000, 13347, 128009]
    assert not set(tokenizer.encode(text)) & {128000, 128009}
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special=False) == text


def test_user_defined_tokens_are_matched_in_any_text(spm: Callable[..., dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_gguf(spm({"\u2581": -1.0, "a": -2.0, "\u2581a": -3.0}))
    tool, blank_a = tokenizer.vocabulary.tokens.index("<|tool|>"), tokenizer.vocabulary.tokens.index("\u2581a")
    # A blank is put before text at the start and after a special token.
    assert tokenizer.encode("a<|tool|>a") == [blank_a, tool, blank_a]
    assert tokenizer.decode([blank_a, tool, blank_a]) == "a<|tool|>a"
    assert tokenizer.decode([blank_a], continuing=True) == " a"
    assert 1 not in tokenizer.encode("<s>a")
    assert tokenizer.encode("<s>a", parse_special=True) == [1, blank_a]
    assert tokenizer.encode("a", add_bos=True) == [1, blank_a]


def test_no_space_prefix(spm: Callable[..., dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_gguf(spm({"\u2581": -1.0, "a": -2.0, "\u2581a": -3.0}, add_space_prefix=False))
    assert [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode("a a")] == ["a", "\u2581a"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def test_longest_special_token_first_wherever_it_stands(spm: Callable[..., dict[str, Any]]) -> None:
    metadata = spm({"\u2581": -1.0, "abc": -1.0, "cdef": -1.0, "a": -1.0, "b": -1.0})
    metadata["tokenizer.ggml.token_type"][-4:-2] = 4
    tokenizer = Tokenizer.from_gguf(metadata)
    tokens = [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode("abcdef")]
    assert tokens == ["\u2581", "a", "b", "cdef"]


def test_phi_3_special_tokens_swallow_the_blanks_after_them(spm: Callable[..., dict[str, Any]]) -> None:
    metadata = spm({"\u2581": -1.0, "a": -2.0, "\u2581a": -3.0}) | {"general.name": "Phi-3 mini"}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode("<|tool|> \n a")] == ["<|tool|>", "\u2581a"]


def test_lone_surrogates_count_as_replacement_characters(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    for name in ("llama-spm", "gpt-2"):
        tokenizer = real_tokenizer(name)
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
        assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_invalid_bytes_become_replacement_characters(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    tokenizer = real_tokenizer("llama-spm")
    first = tokenizer.vocabulary.tokens.index("<0x00>")
    assert tokenizer.decode([first + byte for byte in b"\xe2\x82"]) == "\ufffd"
    assert tokenizer.decode(np.array([first + byte for byte in "€".encode()])) == "€"


@pytest.mark.parametrize("i", [-1, 32000])
def test_an_id_outside_the_vocabulary_is_an_error(real_tokenizer: Callable[[str], Tokenizer], i: int) -> None:
    with pytest.raises(QjaxError, match=f"token id {i} is outside the vocabulary of 32000"):
        real_tokenizer("llama-spm").decode([1, i])
