"""What the commands give: JSON alone on stdout with the keys that scripts rely on, tables, help, exit codes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qjax
from qjax import cli
from qjax.evaluate.shapes import SHAPES, Shape
from qjax.formats.locate import EMBEDDED
from qjax.runs.console import progress_bar
from qjax.runs.texts import decode_rate

Json = Callable[..., dict[str, Any]]
Process = Callable[..., subprocess.CompletedProcess[str]]
Rewritten = Callable[..., Path]


def test_generate(run: Any, run_json: Json, model: Path, tmp_path: Path) -> None:
    options = ("-n", 8, "--temperature", 0)
    found = run_json("generate", model, "-p", "the cat", *options)
    assert found.keys() >= {"text", "ids", "prompt_tokens", "seconds", "tokens_per_second"}
    opened = qjax.load(model)
    assert found["text"] == "".join(opened.generate("the cat", max_tokens=8, temperature=0))
    assert found["text"] == opened.tokenizer.decode(found["ids"], continuing=True)
    assert found["prompt_tokens"] == len(opened.encode("the cat"))
    assert found["seconds"] > 0
    assert found["tokens_per_second"] > 0
    plain = run("generate", model, "-p", "the cat", *options)
    assert plain.out == found["text"] + "\n"
    assert "8 tokens" in plain.err
    (tmp_path / "prompt.txt").write_text("the cat", encoding="utf-8")
    echoed = run("generate", model, "-f", tmp_path / "prompt.txt", *options, "--echo")
    assert echoed.out == "the cat" + plain.out
    stop = found["text"][3:5]
    stopped = run_json("generate", model, "-p", "the cat", *options, "--stop", stop)
    assert stopped["text"] == found["text"][: found["text"].index(stop)]
    two = run("generate", model, "-p", "the cat", "-n", 2)
    assert "2 tokens, first after" in two.err


def test_without_n_the_context_is_filled_at_most(run: Any, run_json: Json, model: Path) -> None:
    found = run_json("generate", model, "-p", " a" * 50, "--temperature", 0)
    assert 0 < len(found["ids"]) <= 128 - found["prompt_tokens"] < 128
    refused = run("generate", model, "-p", " a" * 200)
    assert refused.code == 2
    assert "give a shorter prompt" in refused.err


@pytest.mark.parametrize(
    ("arrivals", "rate"),
    [([], 0.0), ([3.0], 0.0), ([3.0, 3.0], 0.0), ([3.0, 3.5, 3.5], 2.0), ([3.0, 3.5, 4.0, 4.5, 4.5], 2.0)],
)
def test_the_last_token_says_nothing_of_the_speed(arrivals: list[float], rate: float) -> None:
    assert decode_rate(arrivals) == rate


def test_a_seed_repeats(run_json: Json, model: Path) -> None:
    sampled = ("generate", model, "-p", "a", "-n", 8, "--temperature", 2, "--top-k", 50, "--top-p", 0.9, "--seed")
    first, again, other = (run_json(*sampled, seed)["ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_chat(run: Any, model: Path, rewritten: Rewritten, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    path = rewritten(tmp_path / "chat.gguf", model, {"tokenizer.chat_template": template})
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n"))
    result = run("chat", path, "--system", "be brief", "-n", 4, "--temperature", 0)
    assert result.code == 0
    prompt = "<system> be brief\n<user> hi\n"
    assert result.out == "".join(qjax.load(path).generate(prompt, max_tokens=4, temperature=0)) + "\n"


def test_tokenize(run: Any, run_json: Json, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def f(x):\n    return 'ü€😀'\r\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = run_json("tokenize", model, "--file", tmp_path / "a.txt")
    tokenizer = qjax.load(model).tokenizer
    assert found.keys() >= {"ids", "text"}
    assert found["ids"] == tokenizer.encode(text)
    assert found["text"] == text
    with_bos = run_json("tokenize", model, "--file", tmp_path / "a.txt", "--bos")
    assert with_bos["ids"] == [tokenizer.bos_id, *found["ids"]]
    assert with_bos["text"] == text
    assert run("tokenize", model, "-p", "ab").out == " ".join(map(str, tokenizer.encode("ab"))) + "\n"
    assert run_json("tokenize", model, "-p", "<s>")["ids"] != [1]
    assert run_json("tokenize", model, "-p", "<s>", "--special")["ids"] == [1]
    special = ("tokenize", model, "-p", "ab</s>c", "--special")
    plain, with_bos = run_json(*special), run_json(*special, "--bos")
    assert plain["text"] == with_bos["text"] == "ab</s>c"
    assert with_bos["ids"] == [tokenizer.bos_id, *plain["ids"]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run_json("tokenize", model, "--file", "-") == found


def test_tokenize_reads_a_vocabulary_alone(run_json: Json, vocab_folder: Path) -> None:
    paths = sorted(vocab_folder.glob("*.gguf"))
    assert paths
    for path in paths[:3]:
        assert run_json("tokenize", path, "-p", "Hello, wörld 3.14")["text"] == "Hello, wörld 3.14"


def check_inspection(found: dict[str, Any], path: Path) -> None:
    """Against the gguf package's reading of the file."""
    reader = gguf.GGUFReader(path)
    assert found.keys() >= {"format", "arch", "parameters", "bytes", "dequantized_bytes", "bits_per_weight", "tensors"}
    assert found["format"].startswith("GGUF")
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert found["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert found["bytes"] == sum(tensor["bytes"] for tensor in found["tensors"])
    assert found["dequantized_bytes"] == 2 * found["parameters"]
    assert found["bits_per_weight"] == pytest.approx(8 * found["bytes"] / found["parameters"])
    for theirs, ours in zip(reader.tensors, found["tensors"], strict=True):
        assert ours["name"] == theirs.name
        assert ours["shape"] == theirs.shape.tolist()[::-1]
        assert ours["type"] == theirs.tensor_type.name
        assert ours["bytes"] == theirs.n_bytes


def test_inspect(run: Any, run_json: Json, model: Path) -> None:
    found = run_json("inspect", model)
    check_inspection(found, model)
    assert found["arch"] == "llama"
    shown = run("inspect", model)
    assert shown.code == 0
    assert all(tensor["name"] in shown.out for tensor in found["tensors"])
    assert run_json("inspect", model.parent)["tensors"] == found["tensors"]


def test_inspect_files_of_llama_cpp(run_json: Json, interop: Path) -> None:
    for path in sorted(interop.glob("*.gguf")):
        found = run_json("inspect", path)
        check_inspection(found, path)
        assert found["arch"] == (None if path.name == "imatrix.gguf" else "llama")


def test_inspect_shows_names_as_they_are(
    run: Any, run_json: Json, process: Process, model: Path, rewritten: Rewritten
) -> None:
    """Brackets are no markup, and what stdout cannot show becomes an escape."""
    path = rewritten(model.with_name("odd.bin"), model, {"general.name": "a name?"}, {"output.weight": "[/red] [b]é"})
    assert "[/red] [b]é" in run("inspect", path).out
    done = process("inspect", path, env={"PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0
    assert "[/red] [b]\\xe9" in done.stdout
    path.write_bytes(path.read_bytes().replace(b"name?", b"name\xff"))
    assert run_json("inspect", path)["name"].startswith("a name")
    rewritten(path, model, {"general.name": [1, 2]})
    assert run_json("inspect", path)["name"] is None


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("qjax.runs.console.console", Console(file=shown, force_terminal=True, width=80))
    with progress_bar("loading [/red].gguf") as advance:
        advance()
        advance(3, 7, "[b]")
    assert "loading [/red].gguf" in shown.getvalue()
    assert "3/7" in shown.getvalue()


def test_perplexity(run: Any, run_json: Json, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog\n" * 5, encoding="utf-8")
    found = run_json("perplexity", model, "--data", data, "--ctx", 32)
    assert found.keys() >= {"perplexity", "stderr", "tokens", "chunks", "seconds"}
    opened = qjax.load(model)
    ids = opened.encode(data.read_text(encoding="utf-8"))
    want = qjax.perplexity(opened.params, opened.config, ids, n_ctx=32, bos_id=opened.tokenizer.bos_id)
    assert found["perplexity"] == want.perplexity
    assert found["stderr"] == want.stderr
    assert found["chunks"] == len(ids) // 32
    assert found["tokens"] == found["chunks"] * 15
    one = run_json("perplexity", model, "--data", data, "--ctx", 32, "--chunks", 1)
    assert one["chunks"] == 1
    shown = run("perplexity", model, "--data", data, "--ctx", 32)
    assert shown.out.startswith("PPL = ")


def check_bench(found: dict[str, Any], tests: list[str]) -> None:
    assert found.keys() >= {"rows", "load_seconds", "peak_bytes"}
    assert [row["test"] for row in found["rows"]] == tests
    for row in found["rows"]:
        assert row.keys() >= {"test", "tokens_per_second", "std", "samples"}
        assert len(row["samples"]) == 2
        assert row["tokens_per_second"] == pytest.approx(np.mean(row["samples"]))
        assert row["std"] == pytest.approx(np.std(row["samples"], ddof=1))
    assert found["load_seconds"] > 0
    assert found["peak_bytes"] > 1 << 20


def test_bench_of_a_file(run: Any, run_json: Json, model: Path) -> None:
    found = run_json("bench", model, "--pp", 8, "--tg", 4, "--repeat", 2)
    check_bench(found, ["pp8", "tg4"])
    assert found["bytes"] == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors)
    shown = run("bench", model, "--pp", 0, "--tg", 4, "--repeat", 1)
    assert "tg4" in shown.out
    assert "pp" not in shown.out


def test_bench_tells_which_kernels_run(run: Any, run_json: Json, model: Path) -> None:
    for activations in ("float", "int8"):
        found = run_json("bench", model, "--kernels", "--activations", activations)
        assert len(found["rows"]) > 5
        for row in found["rows"]:
            assert row["decode"].startswith(("native", "xla"))
            assert row["prefill"].startswith(("native", "xla"))
    assert "attn_q.weight" in run("bench", model, "--kernels").out


def test_bench_of_a_shape(run_json: Json, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-7b", shape)
    made = ("bench", "--shape", "llama-7b", "--type", "q8_0")
    found = run_json(*made, "--pp", 8, "--tg", 4, "--repeat", 2)
    check_bench(found, ["pp8", "tg4"])
    run_json(*made, "--save", tmp_path / "made.gguf")
    of_file = run_json("bench", tmp_path / "made.gguf", "--pp", 8, "--tg", 0, "--repeat", 2)
    assert of_file["bytes"] == found["bytes"]
    assert of_file["parameters"] == found["parameters"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_bench_on_one_thread(model: Path, process: Process) -> None:
    done = process("bench", model, "--pp", 4, "--tg", 2, "--repeat", 2, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    check_bench(found, ["pp4", "tg2"])
    assert found["threads"] == 1


def test_convert(run: Any, run_json: Json, model: Path, tmp_path: Path) -> None:
    """Bytes as gguf's own encoder makes them; no `--type`, the same bytes."""
    copy, packed = tmp_path / "copy.gguf", tmp_path / "packed.gguf"
    done = run("convert", model, copy)
    assert (done.code, done.out) == (0, "")
    assert copy.read_bytes() == model.read_bytes()
    assert run_json("convert", model, copy) == {
        "path": str(copy),
        "files": [str(copy)],
        "bytes": model.stat().st_size,
    }
    split = run_json("convert", model, tmp_path / "split.gguf", "--split-max-size", "0.05MB")
    assert split["path"] == split["files"][0]
    assert split["bytes"] == sum(Path(file).stat().st_size for file in split["files"]) > model.stat().st_size
    assert run("convert", split["path"], copy).code == 0
    assert copy.read_bytes() == model.read_bytes()
    # Over itself.
    assert run("convert", copy, copy, "--type", "q8_0").code == 0
    assert run("convert", model, packed, "--type", "q8_0").code == 0
    assert packed.read_bytes() == copy.read_bytes()
    kind = gguf.GGMLQuantizationType.Q8_0
    for before, after in zip(gguf.GGUFReader(model).tensors, gguf.GGUFReader(packed).tensors, strict=True):
        floats = before.data.astype(np.float32)
        want = gguf.quants.quantize(floats, kind) if floats.ndim == 2 else before.data
        assert after.data.tobytes() == want.tobytes(), before.name


@pytest.mark.skipif(not EMBEDDED.exists(), reason="the embedded model is not there")
def test_demo(run_json: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In short: one type, one chunk of text. `make demo` does all of it."""
    monkeypatch.setattr("qjax.runs.demo.TYPES", ("q4_0",))
    monkeypatch.setattr("qjax.runs.demo.CHUNKS", 1)
    found = run_json("demo", "--out", tmp_path / "made" / "here")
    [row] = found["rows"]
    assert row["type"] == "q4_0"
    assert 4.5 <= row["bits_per_weight"] < 5
    assert row["perplexity"] > 1
    assert row["tokens_per_second"] > 0
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    assert found["completion"]


@pytest.mark.parametrize("command", cli.parser_and_commands()[1])
def test_help_shows_an_example_that_is_a_command(run: Any, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    _, _, example = result.out.partition("example:\n")
    for line in example.strip().splitlines():
        words = shlex.split(line)
        assert words[:2] == ["qjax", command]
        assert cli.parser_and_commands()[0].parse_args(words[1:]).command == command
    assert re.search(rf"\n    {command}\s", run("--help").out)


def test_version(run: Any) -> None:
    assert run("--version").out == f"qjax {qjax.__version__}\n"


def test_warnings_are_lines_on_stderr_and_stay_in_the_run(run: Any, model: Path) -> None:
    before = warnings.showwarning
    for _ in range(2):
        result = run("generate", model, "-p", "a", "-n", 1, "--quantize", "q8_0", "--json")
        assert result.code == 0
        assert result.err == ""
    path = model.with_name("packed.bin")
    to_q8 = qjax.quantizer("q8_0")
    mixed = qjax.load(model, quantize=lambda name, w: to_q8(name, w) if name == "output.weight" else jnp.float16(w))
    qjax.save(mixed, path)
    for _ in range(2):
        result = run("convert", path, path.with_name("again.bin"), "--type", "q4_0")
        assert result.code == 0
        assert "qjax: warning: output.weight is Q8_0 already and stays so: quantize from a float file\n" in result.err
    assert warnings.showwarning is before
    run("convert", model, path, "--type", "q8_0")
    result = run("convert", path, path.with_name("again.bin"), "--type", "q4_0")
    assert result.code == 2
    assert "every matrix is quantized already; quantize from a float file" in result.err


def test_where_compiled_programs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    for name, folder in (("off", None), (str(tmp_path), tmp_path), ("", tmp_path / "home" / ".cache" / "qjax")):
        told.clear()
        monkeypatch.setenv("QJAX_CACHE", name)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        cli.cache_compilations()
        assert told.get("jax_compilation_cache_dir") == (folder and str(folder / "xla"))


def test_our_own_fault_is_code_1(run: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Any) -> Any:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("qjax.runs.inspect.inspect", fail)
    result = run("inspect", model)
    assert result == (1, "", "qjax: internal error: RuntimeError: two lines (--debug shows where)\n")
    with pytest.raises(RuntimeError, match="two"):
        run("inspect", model, "--debug")


def test_a_break_is_no_fault(run: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("qjax.runs.inspect.inspect", stop)
    assert run("inspect", model) == (130, "", "qjax: interrupted\n")


def test_a_reader_that_leaves_is_no_fault(model: Path) -> None:
    for more in ((), ("--json",)):
        command = [sys.executable, "-m", "qjax.cli", "inspect", str(model), *more]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdout.close()
            assert running.stderr.read() == b""
        assert running.returncode == 0
