"""`qjax quantize --method`: files that open, runs that were killed, and what cannot be, said at once."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from looking import TOKENS, W4, Looking, save_tiny

import qjax
from qjax.calibrate.data import Calibration
from qjax.calibrate.recipes import Recipe
from qjax.cli import main
from qjax.errors import QjaxError, QjaxWarning
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.formats.gguf import open_gguf
from qjax.formats.rules import parse_rule
from qjax.runs import run
from qjax.runs.config import load_config
from qjax.runs.quantize_blocks import Job, output_at, quantize_model

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"
RULES = ("ffn_down=w8", "^blk.0.attn=keep")

# Dies by its own hand, as by `kill -9`: while a block is written, or before the folder is.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from looking import TOKENS, Looking
from qjax import api
from qjax.calibrate.checkpoints import Checkpoints
from qjax.runs import quantize_blocks as q
from qjax.calibrate.recipes import Recipe
from qjax.formats.rules import parse_rule
from looking import W4
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] == "saving":
    api.save = die
else:
    write = Checkpoints.write
    def stop(self, i, *more):
        if i == 2:
            os.fsync = die
        write(self, i, *more)
    Checkpoints.write = stop
recipe = Recipe(Looking(), W4, tuple(map(parse_rule, ("ffn_down=w8", "^blk.0.attn=keep"))))
q.quantize_model(q.Job(sys.argv[2], recipe, q.Calibration(TOKENS, 4)), q.output_at(sys.argv[3], "qjax"))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def job(model: Path) -> Job:
    return Job(model, Recipe(Looking(), W4, tuple(map(parse_rule, RULES))), Calibration(TOKENS, 4))


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A command with --json: its object."""
    monkeypatch.setenv("QJAX_CACHE", "off")

    def call(*argv: Any) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def files(folder: Path) -> dict[str, bytes]:
    """All but the log, in which seconds are."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".csv", ".png")}


def test_a_run_that_is_killed_twice(model: Path, job: Job, tmp_path: Path) -> None:
    """Ends with the bytes of one that is not, and leaves nothing else."""
    (tmp_path / "whole").mkdir()
    whole = quantize_model(job, output_at(tmp_path / "whole" / "out", "qjax"))
    assert whole["resumed"] == 0
    folder = tmp_path / "again"
    folder.mkdir()
    out, partial = folder / "out", folder / "out.partial"
    logged = (tmp_path / "whole" / "out" / "quantization.csv").read_text()
    for when, kept in (("writing", 2), ("saving", 4)):
        command = [sys.executable, "-c", KILLED, str(ROOT / "tests/calibrate"), str(model), str(out), when]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists()
        assert len(list(partial.glob("block-*.safetensors"))) == kept
        # Of what is kept, in order; this method takes no time.
        head, *lines = logged.splitlines(keepends=True)
        told = [head, *(line for line in lines if int(line.split(",")[0]) < kept)]
        assert (partial / "quantization.csv").read_text() == "".join(told)
    made = quantize_model(job, output_at(out, "qjax"))
    assert made["resumed"] == 4
    assert files(out) == files(tmp_path / "whole" / "out")
    assert (out / "quantization.csv").read_text() == logged
    assert [entry.name for entry in folder.iterdir()] == ["out"]


def test_what_is_made(tell: Any, model: Path, tmp_path: Path) -> None:
    """From the command line: a folder that opens, the same logits as when quantized while loading, and a log."""
    out = tmp_path / "out"
    argv = ["quantize", model, "-o", out, "--method", "rtn", "--bits", 4, "--group-size", 32, "--format", "gptq"]
    told = tell(*argv, "--rule", "ffn_down=w8g32", "--rule", "attn_k=keep")
    opened = qjax.load(out)
    direct = qjax.load(model, quantize=qjax.RTN(4, 32, rules=["ffn_down=w8g32", "attn_k=keep"]))
    logits = [np.asarray(qjax.forward(m.params, m.config, jnp.asarray(TOKENS))[0]) for m in (opened, direct)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert told["bytes"] == direct.memory.nbytes
    schemes = {tensor["name"]: tensor["scheme"] for tensor in told["tensors"]}
    assert len(schemes) == 4 * 6
    assert schemes["blk.3.ffn_down.weight"] == "w8g32"
    assert set(told) >= {"path", "format", "bits_per_weight", "seconds", "peak_memory", "resumed", "log"}
    with (out / "quantization.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(schemes)
    assert 0 < float(rows[0]["weight_error"]) < 0.1
    assert rows[0]["output_error"] == ""
    assert (out / "quantization.png").read_bytes().startswith(b"\x89PNG")
    assert "RTN" in (out / "README.md").read_text()


def test_dry_run(tell: Any, model: Path, tmp_path: Path) -> None:
    """Says the sizes that are then made."""
    argv = ["quantize", model, "--method", "rtn", "--group-size", 32, "--rule", "attn_v=keep"]
    planned = tell(*argv, "--dry-run")
    made = tell(*argv, "-o", tmp_path / "o.gguf", "--format", "gguf")
    assert {t["name"]: t["scheme"] for t in planned["tensors"] if t["scheme"] != "keep"} == {
        t["name"]: t["scheme"] for t in made["tensors"]
    }
    assert planned["bytes"] == made["bytes"]
    assert open_gguf(tmp_path / "o.gguf").tensors["blk.1.attn_q.weight"].type == "Q4_0"
    assert (tmp_path / "o-quantization.csv").exists()


SLOWER = [pytest.param(method, marks=pytest.mark.slow) for method in ("awq", "learned")]


@pytest.mark.parametrize("method", ["gptq", "smoothquant", *SLOWER])
def test_methods(tell: Any, model: Path, method: str, tmp_path: Path) -> None:
    """Each by its name, from calibration text to a folder that opens."""
    np.save(tmp_path / "ids.npy", TOKENS)
    group = [] if method == "smoothquant" else ["--group-size", 32]
    argv = ["quantize", model, "-o", tmp_path / "out", "--method", method, "--data", tmp_path / "ids.npy"]
    steps = ["--steps", 2, "--seed", 1] if method == "learned" else []
    told = tell(*argv, *group, *steps, "--samples", 4, "--format", "compressed-tensors")
    assert (told["samples"], told["seq_len"]) == (4, 16)
    assert method in told["method"].lower()
    assert all(tensor["output_error"] is not None for tensor in told["tensors"])
    opened = qjax.load(tmp_path / "out")
    logits, _ = qjax.forward(opened.params, opened.config, jnp.asarray(TOKENS))
    assert np.isfinite(logits).all()


REFUSED = (
    (["--method", "gtpq"], "expected a method of rtn, gptq"),
    (["--method", "gptq"], "no calibration data"),
    (["--method", "gptq", "--data", "short.txt"], "fewer than one sample of 64"),
    (["--method", "gptq", "--data", "LICENSE", "--seq-len", "65"], "samples of 2 to 64 tokens"),
    (["--method", "gptq", "--data", "nowhere.txt"], "cannot read"),
    (["--method", "rtn", "--bits", "7"], "expected bits of 2, 3, 4, 5, 6, 8"),
    (["--method", "rtn", "--group-size", "48"], "blk.0.attn_q.weight: rows of 64 are no whole groups of 48: give it"),
    (["--method", "rtn", "--rule", "attn=w9"], "expected bits of"),
    (["--method", "rtn", "--rule", "attn=q4_k"], "expected a scheme such as w4g128"),
    (["--method", "rtn", "--rule", ".=keep"], "every matrix is kept"),
    (["--method", "rtn", "--act-order"], "RTN has no option 'act_order'"),
    (["--method", "rtn", "--steps", "3"], "RTN has no option 'steps'"),
    (["--method", "rtn", "--format", "onnx"], "expected a format of gptq"),
    (["--method", "rtn", "--format", "gptq", "--bits", "5"], "blk.0.attn_q.weight would be w5g32"),
    (["--method", "rtn", "--format", "awq", "--bits", "3"], "blk.0.attn_q.weight would be w3g32"),
    (["--method", "rtn", "--format", "gguf", "--bits", "3"], "would be w3g32: of GGUF's types Q4_0"),
    (["--method", "smoothquant", "--format", "gptq"], "activations"),
    (["--method", "rtn", "--type", "q4_k_m"], "--type: is for llama.cpp's mixes"),
    (["--method", "rtn", "--imatrix", "i.gguf", "--pure"], "--imatrix, --pure: is for llama.cpp's mixes"),
    (["--type", "q4_0", "--bits", "4", "--rule", "a=w8"], "--bits, --rule: is for a method"),
    (["--type", "q4_0", "--data", "x.txt"], "--data is for a budget or a method"),
    ([], "give --type, or --method"),
)


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_what_is_refused(
    argv: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """In one line, before anything is written."""
    monkeypatch.setenv("QJAX_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    (tmp_path / "LICENSE").symlink_to(TEXT)
    sized = [] if "--group-size" in argv or "--method" not in argv or "smoothquant" in argv else ["--group-size", "32"]
    assert main(["quantize", str(model), "-o", "out", *argv, *sized]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt", "LICENSE"}


def test_where_something_is_already(job: Job, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    with pytest.raises(QjaxError, match="is there already"):
        output_at(tmp_path / "there", "gptq")
    with pytest.raises(QjaxError, match="make it first"):
        output_at(tmp_path / "no" / "such", "gptq")
    (tmp_path / "empty").mkdir()
    output_at(tmp_path / "empty", None)
    assert output_at(tmp_path / "o.gguf", None).format == "gguf"


def test_from_a_config(model: Path, tmp_path: Path) -> None:
    """What the command line does, and the same mistakes."""
    (tmp_path / "m.gguf").symlink_to(model)
    np.save(tmp_path / "ids.npy", TOKENS)
    text = "{kind: quantize, source: m.gguf, output: made/%s, %s}"
    config = tmp_path / "c.yaml"
    config.write_text(text % ("out", "method: rtn, scheme: w4g32, rules: [ffn_down=w8g32, attn_k=keep], format: gptq"))
    assert run(config) == tmp_path / "made" / "out"
    layer = qjax.load(tmp_path / "made" / "out").params["layers"][0]
    assert (layer["ffn_up"].bits_per_weight, layer["ffn_down"].bits_per_weight) == (4.5, 8.5)
    for more, said in (
        ("method: rtn, scheme: w4x", "expected a scheme"),
        ("method: rtn, type: q4_0", "type: is for a mix"),
        ("type: q4_0, rules: [attn=w8], seed: 3", "rules, seed: is for a method"),
        ("method: gptq, scheme: w4g32", "no calibration data"),
    ):
        config.write_text(text % ("none", more))
        with pytest.raises(QjaxError, match=said):
            run(config)


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
import numpy as np
from looking import Looking, W4, save_tiny
from qjax.calibrate.data import Calibration
from qjax.calibrate.recipes import Recipe
from qjax.runs.quantize_blocks import Job, output_at, peak_memory, quantize_model
recipe, tokens = Recipe(Looking(), W4), np.zeros((16, 64), np.int32)
# The programs that this process holds in any case.
quantize_model(Job(sys.argv[2], recipe, Calibration(tokens, 16)), output_at(sys.argv[4] + "-tiny", "qjax"))
before = peak_memory()
made = quantize_model(Job(sys.argv[3], recipe, Calibration(tokens, 16)), output_at(sys.argv[4], "qjax"))
print(made["bytes"], made["peak_memory"] - before)
"""


@pytest.mark.slow
def test_peak_memory(model: Path, tmp_path: Path) -> None:
    """The packed model, a few times one float32 block, and the activations: far from the float model."""
    config = llama(layers=32, hidden=1024, heads=8, kv_heads=8, ffn=2816, vocab=320, context=64)
    large, out = tmp_path / "large.gguf", tmp_path / "out"
    save_synthetic(large, Shape("large", config), "f16")
    command = [sys.executable, "-c", PEAK, str(ROOT / "tests/calibrate"), str(model), str(large), str(out)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    packed, more = map(int, done.stdout.split())
    block = 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
    activations = 2 * 4 * 16 * 64 * 1024
    print(f"float model {large.stat().st_size:,}, packed {packed:,}, block {block:,}, peak {more:,}")
    assert more < packed + 4 * block + 4 * activations < large.stat().st_size


def test_unused_rules_are_told(model: Path, tmp_path: Path) -> None:
    recipe = qjax.RTN(4, 32, rules=["q_norm=w8"])
    with pytest.warns(QjaxWarning, match="'q_norm=w8' is not used"):
        quantize_model(Job(model, recipe), output_at(tmp_path / "out", "qjax"))


def test_the_config_in_the_repository(model: Path, tmp_path: Path) -> None:
    """As it stands, but for where it writes and how much it looks at."""
    text = (ROOT / "configs/gptq.yaml").read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "LICENSE").symlink_to(TEXT)
    config = tmp_path / "configs" / "gptq.yaml"
    load_config(ROOT / "configs/gptq.yaml")
    wanted = (("method: gptq", "method: rtn"), ("act_order: true", ""), ("damp: 0.01", ""), ("w4g128", "w4g32"))
    for theirs, ours in (*wanted, ("w8g128", "w8g32"), ("source: embedded", f"source: {model}")):
        assert theirs in text
        text = text.replace(theirs, ours)
    config.write_text(text)
    out = run(config)
    assert out.resolve() == tmp_path / "runs/quantize/embedded-gptq"
    layers = qjax.load(out).params["layers"]
    assert (layers[1]["ffn_down"].bits_per_weight, layers[1]["ffn_up"].bits_per_weight) == (8.5, 4.5)
    assert layers[0]["attn_v"].dtype == np.float16
