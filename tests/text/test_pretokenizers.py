"""The patterns of pre-tokenizers against those that the models were published with."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from qjax.errors import UnsupportedError
from qjax.text.pretokenizers import PRE_TOKENIZERS, pre_tokenizer

BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = ByteLevel(add_prefix_space=False, use_regex=True)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"


def split(*patterns: str) -> PreTokenizer:
    return Sequence([*(Split(Regex(pattern), "isolated") for pattern in patterns), BYTES])


# As in tokenizer.json of the models named.
PUBLISHED = {
    "gpt-2": WORDS,
    "llama-bpe": split(rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"),
    "qwen2": split(rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{SYMBOLS}|{SPACES}"),
    "starcoder": Sequence([Digits(individual_digits=True), WORDS]),
    "deepseek-v3": split(
        r"\p{N}{1,3}",
        r"[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
    ),
}
text = st.lists(
    st.sampled_from([*"aZé9٣½ \t\n\r'sTlvre.,!$+-_中か한\u0301\u3000\u00a0", "'ll", "'RE", "\r\n", "  ", "Hello"]),
    max_size=25,
).map("".join)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=150)
@given(text)
def test_words_equal_the_published_pattern_s(name: str, text: str) -> None:
    assert split(*pre_tokenizer(name).patterns).pre_tokenize_str(text) == PUBLISHED[name].pre_tokenize_str(text)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
@settings(max_examples=10)
@given(text)
def test_every_pattern_compiles_and_loses_nothing(name: str, text: str) -> None:
    splits = Sequence([Split(Regex(pattern), "isolated") for pattern in pre_tokenizer(name).patterns])
    assert "".join(piece for piece, _ in splits.pre_tokenize_str(text)) == text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        # Found by running llama.cpp itself, where no published pattern says so.
        ("falcon", "a`1234", ["a", "`", "123", "4"]),
        ("deepseek-llm", "中\u3000文  ", ["中", "\u3000", "文", "  "]),
        ("deepseek-coder", "f(12)", ["f", "(", "1", "2", ")"]),
        ("tekken", "fooBar12", ["foo", "Bar", "1", "2"]),
        ("gpt-4o", "XMLHttp'S 1234", ["XMLHttp'S", " ", "123", "4"]),
        ("afmoe", "a 1234", ["a", " ", "1", "234"]),
        ("superbpe", "of 1234567", ["of ", "1", "234", "567"]),
        ("kimi-k2", "ab中文c", ["ab", "中文", "c"]),
        ("bloom", "Hi, you", ["Hi", ",", " you"]),
        ("default", "a=b 12345", ["a", "=", "b", " ", "123", "45"]),
    ],
)
def test_words(name: str, text: str, words: list[str]) -> None:
    splits = Sequence([Split(Regex(pattern), "isolated") for pattern in pre_tokenizer(name).patterns])
    assert [piece for piece, _ in splits.pre_tokenize_str(text)] == words


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"unknown pre-tokenizer 'gpt-9'; known are .*llama-bpe.*qwen2"):
        pre_tokenizer("gpt-9")
