"""How text is cut, by the steps of a tokenizer.json; llama.cpp's converter knows it by the hash of a text's ids."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from qjax.errors import UnsupportedError
from qjax.formats.gguf import open_gguf
from qjax.formats.huggingface.pretokenizers import pre_tokenizer_json, pre_tokenizer_name

# The text and, of known vocabularies (with BOS where the model adds it), the hashes: llama.cpp's conversion/base.py.
CHECKED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ "
    "🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
HASHES = {
    "llama-bpe": "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5",
    "qwen2": "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea",
    "gpt-2": "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454",
    "deepseek-coder": "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821",
}


@pytest.mark.interop
@pytest.mark.parametrize("name", HASHES)
def test_a_known_vocabulary_gives_the_ids_that_llama_cpp_knows(name: str, vocab_folder: Path) -> None:
    metadata = open_gguf(vocab_folder / f"ggml-vocab-{name}.gguf").metadata
    normal = metadata["tokenizer.ggml.token_type"] == 1
    vocab = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"]) if normal[i]}
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    found = pre_tokenizer_json(name)
    assert found is not None
    described, ignore_merges = found
    bare = json.loads(Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)).to_str())
    made = Tokenizer.from_str(json.dumps({**bare, "pre_tokenizer": described}))
    ids = made.encode(CHECKED, add_special_tokens=False).ids
    if name in ("llama-bpe", "deepseek-coder"):
        ids = [metadata["tokenizer.ggml.bos_token_id"], *ids]
    assert hashlib.sha256(str(ids).encode()).hexdigest() == HASHES[name]
    assert pre_tokenizer_name({"pre_tokenizer": described, "model": {"ignore_merges": ignore_merges}}, "here") == name


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({}, "cuts by 'None'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "ByteLevel"}, "model": {"ignore_merges": True}}, "ignore_merges True"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}}, r"w\+"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}, "'3'"),
    ],
)
def test_one_that_is_not_known_is_described(tokenizer: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        pre_tokenizer_name(tokenizer, "tokenizer.json")
    assert "known are llama-bpe" in str(caught.value)
