"""A folder seen as a GGUF file: what its files may say, and what is refused; see tests/interop for what it gives."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

import qjax
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.huggingface.source import open_folder
from qjax.formats.source import Source, open_source

Copied = Callable[..., Path]
Change = Callable[..., None]


def test_it_is_a_source(copied: Copied) -> None:
    folder = open_source(copied())
    assert isinstance(folder, Source)
    assert folder.format == "Hugging Face safetensors"
    for name, tensor in folder.tensors.items():
        data = folder.raw(name)
        assert data.shape[:-1] == tensor.shape[:-1]
        assert data.nbytes == tensor.nbytes
        folder.release(name)
        np.testing.assert_array_equal(folder.raw(name), data)
    with pytest.raises(QjaxError, match="there is no tensor 'x'"):
        folder.raw("x")
    with pytest.raises(QjaxError, match="there is no tensor 'x'"):
        folder.release("x")


ROPE = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not known; known are LlamaForCausalLM"),
        ({"architectures": 3}, "architecture 'None' is not known"),
        ({"quantization_config": "x"}, "quantization_config is 'x', expected an object"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not known"),
        ({"hidden_size": None}, "hidden_size is 'None', expected a whole number"),
        ({"num_attention_heads": 2.0}, "num_attention_heads is"),
        ({"num_hidden_layers": True}, "num_hidden_layers is"),
        ({"vocab_size": 1 << 40}, "vocab_size is"),
        ({"vocab_size": 300}, "expected 0 to 299, by vocab_size"),
        ({"num_attention_heads": 5}, "expected a multiple of 2 for each of 5 heads"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', expected a positive number"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' of llama is not known"),
        ({"rope_parameters": {**ROPE, "factor": -1}}, "factor is '-1'"),
        ({"rope_parameters": {**ROPE, "low_freq_factor": 9.0}}, "low_freq_factor 9.0 is not below"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_configs_that_are_refused(copied: Copied, changes: dict[str, Any], words: str) -> None:
    folder = copied(**changes)
    with pytest.raises(QjaxError, match=words) as caught:
        open_folder(folder)
    assert str(folder) in str(caught.value)


def test_qwen_has_no_scaling_of_llama_3(copied: Copied) -> None:
    with pytest.raises(QjaxError, match="'llama3' of qwen2 is not known"):
        open_folder(copied("qwen2", rope_parameters=ROPE))


def test_shapes_that_do_not_fit_the_config(copied: Copied, change: Change, tmp_path: Path) -> None:
    folder = copied(intermediate_size=64)
    for call in (qjax.load, lambda path: qjax.convert(path, tmp_path / "x.gguf")):
        with pytest.raises(QjaxError, match=r"ffn_\w+\.weight' is .*expected .* from the metadata"):
            call(folder)
    change(folder / "config.json", intermediate_size=48, num_hidden_layers=3)
    with pytest.raises(QjaxError, match=r"'blk\.2\.attn_q\.weight' is missing"):
        qjax.convert(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_dtypes_and_names_that_are_not_known(copied: Copied) -> None:
    folder = copied("mistral")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    with pytest.raises(QjaxError, match="has the dtype I32"):
        open_folder(folder)
    path.write_bytes(whole.replace(b"lm_head.weight", b"xx_head.weight"))
    with pytest.raises(QjaxError, match=r"tensor 'xx_head\.weight' is not part of a llama model"):
        open_folder(folder)
    path.write_bytes(whole.replace(b"[360,24]", b"[8640,1]").replace(b"[32]", b"[]  "))
    with pytest.raises(QjaxError, match=r"model\.safetensors"):
        open_folder(folder)


def test_older_spellings_of_rope(copied: Copied, change: Change) -> None:
    new = open_folder(copied())
    scaling = json.loads((new.path / "config.json").read_text())["rope_parameters"]
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    change(new.path / "config.json", rope_parameters=None, rope_scaling={**scaling, "type": kind}, rope_theta=theta)
    old = open_folder(new.path)
    assert old.metadata["llama.rope.freq_base"] == new.metadata["llama.rope.freq_base"] == 500000.0
    np.testing.assert_array_equal(old.raw("rope_freqs.weight"), new.raw("rope_freqs.weight"))
    change(new.path / "config.json", rope_scaling=None)
    assert "rope_freqs.weight" not in open_folder(new.path).tensors


def test_how_far_tokens_look_back(copied: Copied, change: Change) -> None:
    assert qjax.load(copied("mistral")).config.window == 16
    key = "qwen2.attention.sliding_window"
    folder = copied("qwen2", sliding_window=8, layer_types=None)
    assert key not in open_folder(folder).metadata
    change(folder / "config.json", use_sliding_window=True, max_window_layers=2)
    assert key not in open_folder(folder).metadata
    change(folder / "config.json", max_window_layers=0)
    assert open_folder(folder).metadata[key] == 8
    change(folder / "config.json", layer_types=["full_attention", "sliding_attention"])
    with pytest.warns(QjaxWarning, match="only some of its layers look back no further than 8"):
        assert key not in open_folder(folder).metadata


def test_a_folder_without_tokenizer_runs_on_ids(copied: Copied) -> None:
    folder = copied()
    (folder / "tokenizer.json").unlink()
    with pytest.warns(QjaxWarning, match=r"neither tokenizer\.model nor tokenizer\.json"):
        model = qjax.load(folder)
    assert len(list(model.params["layers"])) == 2
    with pytest.raises(QjaxError, match="'none' is not supported"):
        _ = model.tokenizer


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "type 'Unigram'; known is BPE"),
        ("tokenizer.json", {"model": 3}, "type 'None'; known is BPE"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "is none that qjax has"),
        ("tokenizer.json", {"added_tokens": [{"id": 9999, "content": "x"}]}, "'x' has the id '9999'"),
        ("tokenizer.json", {"added_tokens": [3]}, "an added token is '3'"),
        ("tokenizer.json", {"post_processor": [3]}, "tokenizer's files are damaged"),
        ("tokenizer_config.json", {"bos_token": {"content": 3}, "chat_template": 3}, None),
    ],
)
def test_tokenizer_files_that_are_refused(
    copied: Copied, change: Change, file: str, changes: dict[str, Any], words: str | None
) -> None:
    folder = copied()
    change(folder / file, **changes)
    if words is None:
        assert "tokenizer.chat_template" not in open_folder(folder).metadata
        return
    with pytest.raises(QjaxError, match=words) as caught:
        open_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "README.md"])
def test_files_that_are_no_json(copied: Copied, file: str) -> None:
    folder = copied()
    (folder / file).write_bytes(b"---\n{[\n---\n\xff")
    with pytest.raises(QjaxError, match=str(folder)):
        open_folder(folder)


def test_pieces_that_are_damaged(copied: Copied) -> None:
    folder = copied("llama-spm")
    path = folder / "tokenizer.model"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 1, 5, 1000):
        path.write_bytes(whole[:cut])
        with pytest.raises(QjaxError, match=r"tokenizer\.model"):
            open_folder(folder)
    for _ in range(20):
        spoilt = bytearray(whole)
        spoilt[rng.integers(2000)] = rng.integers(256)
        path.write_bytes(spoilt)
        with contextlib.suppress(QjaxError):
            open_folder(folder)


def test_added_tokens_beyond_the_model(copied: Copied) -> None:
    folder = copied("llama-spm")
    (folder / "added_tokens.json").write_text('{"<far>": 370}')
    with pytest.warns(QjaxWarning, match="token 370, '<far>', is beyond the 370"):
        open_folder(folder)
    (folder / "added_tokens.json").write_text('{"<far>": "x"}')
    with pytest.raises(QjaxError, match="expected ids of tokens, got 'x'"):
        open_folder(folder)


def test_a_sentencepiece_vocabulary_of_tokenizer_json_alone(interop: Path, copied: Copied) -> None:
    """The converter's one score for all would cut text otherwise; the merges' order cuts it as it was taught."""
    folder = copied("llama-spm", vocab_size=2048)
    (folder / "tokenizer.model").unlink()
    (folder / "added_tokens.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(interop / "hf-float" / name, folder / name)
    ours = qjax.api.read_tokenizer(open_folder(folder).metadata, folder)
    theirs = HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json"))
    text = (interop / "heldout.txt").read_text(encoding="utf-8")[:5000]
    assert ours.encode(text, add_bos=True) == theirs.encode(text).ids
