"""The tokenizer: lossless, the same each time, and every id of it in the metadata."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qjax.runs.train_tokenizer import BOS, EOS, tokenizer_metadata, train_tokenizer

TEXTS = ["def f(x):\n        return x\n" * 5, "class A:\n    def f(self):\n        return self.x\n" * 5]
TOKENIZER = train_tokenizer(TEXTS, 300)


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == TOKENIZER.to_str()


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    if BOS not in text and EOS not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_a_line_break_and_its_indentation_are_one_token() -> None:
    tokens = TOKENIZER.encode("def f(x):\n        return x").tokens
    assert "Ċ" + 7 * "Ġ" in tokens


def test_metadata_lists_every_id_and_merge() -> None:
    metadata = tokenizer_metadata(TOKENIZER, 310)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 310
    vocab = TOKENIZER.get_vocab()
    assert all(vocab[token] == index for index, token in enumerate(tokens[: len(vocab)]))
    assert tokens[:2] == [BOS, EOS]
    assert [index for index in range(310) if types[index] == 3] == [0, 1, *range(len(vocab), 310)]
    assert types.dtype == np.int32
    merges = json.loads(TOKENIZER.to_str())["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]] == [tuple(m) for m in merges]
