"""What is wrong with a file or a call is said in one line on stderr, with exit code 2."""

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.formats.gguf import open_gguf

Process = Callable[..., subprocess.CompletedProcess[str]]
Rewritten = Callable[..., Path]
cuts = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(result: Any, *words: str) -> None:
    """Exit code 2, and one line that holds the words."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("qjax: error: ")
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    for word in words:
        assert word in result.err


def spoilt(model: Path, rewritten: Rewritten, folder: Path) -> list[tuple[Path, str]]:
    """Files that no command can use, and what is to be said of each."""
    data = model.read_bytes()
    name = b"output.weight"
    kind = data.index(name) + len(name) + 4 + 16
    contents = {
        "empty": (b"", "empty"),
        "magic": (b"FUGG" + data[4:], "magic"),
        "text": (b"once upon a time\n" * 9, "magic"),
        "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[1]}}' + bytes(50), "safetensors"),
        "version": (data[:4] + struct.pack("<I", 9) + data[8:], "version"),
        "type": (data[:kind] + struct.pack("<I", 999) + data[kind + 4 :], "type"),
        "tensors": (data[:8] + struct.pack("<Q", 2**60) + data[16:], "tensors"),
        # As "split.count", the writer would leave it out.
        "m-00001-of-00002.gguf": (
            rewritten(folder / "shard", model, {"SPLIT.count": 2}).read_bytes().replace(b"SPLIT", b"split"),
            "m-00002-of-00002.gguf is missing",
        ),
    }
    for case, (content, _) in contents.items():
        (folder / case).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "folder" / "model.safetensors").write_bytes(b"")
    said = {case: words for case, (_, words) in contents.items()}
    said |= {"missing.gguf": "no such file", "folder": "no .gguf file there"}
    return [(folder / case, words) for case, words in said.items()]


def test_files_that_cannot_be_read(run: Any, model: Path, rewritten: Rewritten, tmp_path: Path) -> None:
    for path, word in spoilt(model, rewritten, tmp_path):
        for command in (("inspect",), ("inspect", "--json"), ("tokenize", "-p", "a"), ("generate", "-p", "a")):
            result = run(command[0], path, *command[1:])
            refused(result, word, str(path))
        refused(run("convert", path, tmp_path / "out.gguf"), word)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("meta", "tensors", "words"),
    [
        ({"general.architecture": "mamba"}, {}, ["'mamba' is not known; known are llama, qwen2, qwen3"]),
        ({"general.architecture": None}, {}, ["general.architecture"]),
        ({"llama.expert_count": 8}, {}, ["mixture of experts", "known are"]),
        ({"llama.block_count": "one"}, {}, ["llama.block_count"]),
        ({"tokenizer.ggml.model": "rwkv"}, {}, ["rwkv"]),
        ({"tokenizer.ggml.model": None}, {}, ["tokenizer"]),
        ({}, {"token_embd.weight": ""}, ["token_embd.weight", "missing"]),
        ({}, {"blk.0.ffn_up.weight": ""}, ["blk.0.ffn_up.weight", "missing"]),
        ({}, {"blk.0.ffn_up.weight": "blk.0.ffn_top.weight"}, ["blk.0.ffn_up.weight", "missing"]),
    ],
)
def test_models_that_cannot_be_run(
    run: Any,
    model: Path,
    rewritten: Rewritten,
    tmp_path: Path,
    meta: dict[str, Any],
    tensors: dict[str, str],
    words: list[str],
) -> None:
    path = rewritten(tmp_path / "m.gguf", model, meta, tensors)
    (tmp_path / "text.txt").write_text("text " * 100)
    for command in (("generate", path, "-p", "a"), ("perplexity", path, "--data", tmp_path / "text.txt", "--ctx", 8)):
        refused(run(*command, "--json"), *words, str(path))
    if any(key.startswith("tokenizer.") for key in meta):
        refused(run("tokenize", path, "-p", "a"), *words, str(path))
    # What can be said of it is said.
    assert run("inspect", path).code == 0


def test_a_vocabulary_holds_no_weights(run: Any, vocab_folder: Path) -> None:
    for path in sorted(vocab_folder.glob("*.gguf")):
        result = run("generate", path, "-p", "a")
        refused(result, str(path))
        assert "no weights" in result.err or "is not known" in result.err


@cuts
@given(st.data())
def test_a_file_cut_anywhere(run: Any, model: Path, tmp_path: Path, data: Any) -> None:
    whole = model.read_bytes()
    header = min(info.offset for info in open_gguf(model).tensors.values())
    size = data.draw(st.integers(0, header) | st.integers(0, len(whole) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:size])
    refused(run("inspect", path), str(path))


@settings(parent=cuts, max_examples=40)
@given(st.data())
def test_a_file_of_llama_cpp_cut_anywhere(run: Any, interop: Path, tmp_path: Path, data: Any) -> None:
    whole = (interop / "tiny-q4_K_M.gguf").read_bytes()
    size = data.draw(st.integers(0, 46_080) | st.integers(0, len(whole) - 32))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:size])
    command = data.draw(st.sampled_from([["inspect"], ["tokenize", "-p", "a"], ["generate", "-p", "a"]]))
    refused(run(command[0], path, *command[1:]), str(path))


NUMBERS = [0, 1, 2, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@settings(parent=cuts, max_examples=50)
@given(st.data())
def test_a_damaged_file_is_never_our_fault(run: Any, model: Path, tmp_path: Path, data: Any) -> None:
    damaged = bytearray(model.read_bytes())
    header = min(info.offset for info in open_gguf(model).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        # The keys come first and the tensors' descriptions last, the vocabulary fills the middle.
        place = data.draw(st.integers(0, 1000) | st.integers(header - 1000, header) | st.integers(0, header))
        number = data.draw(st.sampled_from(NUMBERS) | st.integers(0, 2**64 - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        damaged[place : place + width] = struct.pack("<Q", number)[:width]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    for command in (["inspect"], ["tokenize", "-p", "a <s> é"], ["convert", tmp_path / "out.bin", "--type", "f16"]):
        result = run(command[0], path, *command[1:])
        if result.code != 0:
            refused(result, str(path))


GENERATE = ["generate", "MODEL", "-p", "a", "-n", "2"]
PERPLEXITY = ["perplexity", "MODEL", "--data", "TEXT"]
WRONG_CALLS: list[tuple[list[str], str]] = [
    ([], "command"),
    (["dance"], "dance"),
    (["generate"], "model"),
    (["inspect", "MODEL", "--joke"], "--joke"),
    (["generate", "MODEL"], "one of them"),
    (["generate", "MODEL", "-p", "a", "-f", "TEXT"], "one of them"),
    (["generate", "MODEL", "-f", "missing.txt"], "missing.txt"),
    (["generate", "MODEL", "-f", "LATIN"], "is not UTF-8"),
    (["generate", "MODEL", "-f", "FOLDER"], "cannot read"),
    (["generate", "MODEL", "-p", "abc " * 100], "exceed the context of 128"),
    ([*GENERATE, "-n", "0"], "at least 1"),
    ([*GENERATE, "-n", "some"], "a whole number, got 'some'"),
    ([*GENERATE, "-n", "1000000000000000000000"], "exceed the context"),
    ([*GENERATE, "--temperature", "-1"], "temperature"),
    ([*GENERATE, "--temperature", "nan"], "temperature"),
    ([*GENERATE, "--temperature", "inf"], "temperature"),
    ([*GENERATE, "--temperature", "warm"], "a number, got 'warm'"),
    ([*GENERATE, "--top-p", "0"], "top-p"),
    ([*GENERATE, "--top-p", "2", "--temperature", "0"], "top-p"),
    ([*GENERATE, "--min-p", "1.5"], "min-p"),
    ([*GENERATE, "--top-k", "-3"], "at least 0"),
    ([*GENERATE, "--repetition-penalty", "0"], "repetition penalty"),
    ([*GENERATE, "--seed", "-1"], "at least 0"),
    ([*GENERATE, "--seed", "4294967296"], "seed"),
    ([*GENERATE, "--stop", ""], "stop string is empty"),
    ([*GENERATE, "--quantize", "q9_9"], "known are f32, f16"),
    ([*GENERATE, "--activations", "int3"], "int3"),
    ([*PERPLEXITY, "--ctx", "31"], "even"),
    ([*PERPLEXITY, "--ctx", "4"], "even"),
    ([*PERPLEXITY, "--ctx", "256"], "128"),
    ([*PERPLEXITY, "--ctx", "128"], "give a longer one"),
    ([*PERPLEXITY, "--ctx", "8", "--chunks", "0"], "at least 1"),
    (["perplexity", "MODEL"], "--data"),
    (["perplexity", "MODEL", "--data", "EMPTY", "--ctx", "8"], "give a longer one"),
    (["perplexity", "MODEL", "--data", "LATIN"], "is not UTF-8"),
    (["tokenize", "MODEL"], "one of them"),
    (["tokenize", "MODEL", "--file", "LATIN"], "is not UTF-8"),
    (["convert", "MODEL", "FOLDER"], "directory"),
    (["convert", "MODEL", "FOLDER/missing/x.gguf"], "missing"),
    (["convert", "MODEL", "x.gguf", "--type", "q9_9"], "known are f32, f16"),
    (["convert", "MODEL", "x.gguf", "--split-max-size", "2X"], "expected a size such as 3.5GiB or 500M, got '2X'"),
    (["convert", "MODEL"], "by -o FILE"),
    (["convert", "MODEL", "x.gguf", "-o", "y.gguf"], "once"),
    (["bench"], "one of them"),
    (["bench", "MODEL", "--shape", "llama-7b"], "one of them"),
    (["bench", "MODEL", "--type", "q4_0"], "--shape"),
    (["bench", "MODEL", "--save", "x.gguf"], "--shape"),
    (["bench", "--shape", "llama-8b"], "llama-7b"),
    (["bench", "--shape", "llama-7b", "--quantize", "q4_0"], "--type"),
    (["bench", "--shape", "llama-7b", "--type", "q9_9"], "q9_9"),
    (["bench", "MODEL", "--pp", "0", "--tg", "0"], "expected tokens to measure"),
    (["bench", "MODEL", "--pp", "200"], "128"),
    (["bench", "MODEL", "--repeat", "0"], "at least 1"),
    (["bench", "MODEL", "--threads", "0"], "at least 1"),
    (["bench", "MODEL", "--threads", "100000"], "threads"),
    (["run", "missing.yaml"], "missing.yaml"),
    (["run", "TEXT"], "TEXT"),
]


@pytest.mark.parametrize(("words", "said"), WRONG_CALLS, ids=[" ".join(words)[:70] for words, _ in WRONG_CALLS])
def test_wrong_calls(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXT").write_text("a few words")
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "LATIN").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "FOLDER").mkdir()
    refused(run(*[model if word == "MODEL" else word for word in words]), said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FOLDER", "LATIN", "TEXT"]


def test_an_empty_prompt_needs_a_bos(run: Any, model: Path, rewritten: Rewritten, tmp_path: Path) -> None:
    assert run("generate", model, "-p", "", "-n", 1).code == 0
    path = rewritten(tmp_path / "m.gguf", model, {"tokenizer.ggml.add_bos_token": False})
    refused(run("generate", path, "-p", "", "-n", 1), "a prompt has no tokens")


def test_weights_that_are_no_numbers(run: Any, model: Path, tmp_path: Path) -> None:
    data = bytearray(model.read_bytes())
    info = open_gguf(model).tensors["output.weight"]
    data[info.offset : info.offset + info.nbytes] = b"\xff\x7f" * (info.nbytes // 2)
    (tmp_path / "nan.gguf").write_bytes(data)
    (tmp_path / "text.txt").write_text("a few words " * 20)
    command = ("perplexity", tmp_path / "nan.gguf", "--data", tmp_path / "text.txt", "--ctx", 16)
    refused(run(*command, "--json"), "nan.gguf", "no finite number")


def test_one_command_in_its_own_process(model: Path, process: Process, tmp_path: Path) -> None:
    done = process("generate", model, "-p", "a", "-n", "3", "--temperature", "0", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert len(json.loads(done.stdout)["ids"]) == 3
    assert "Warning" not in done.stderr
    wrong = process("inspect", "missing.gguf", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("qjax: error: missing.gguf: no such file")
