"""`qjax quantize`: a float file to mixes, with and without importance, and what it refuses."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf.quants as oracle
import jax
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

import qjax
from qjax.cli import main
from qjax.errors import QjaxError, QjaxWarning
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.plan import Wish
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.locate import locate
from qjax.models import rewrite
from qjax.models.load import read_array
from qjax.quantizers.ggml import encode
from qjax.runs import run
from qjax.runs.quantize import dry_run, plan_file, quantize_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "q4_k_m.gguf"
    quantize_file("embedded", path, Wish("q4_k_m"))
    return path


def importance_file(path: Path, columns: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    tensors = []
    for name, n in columns.items():
        for suffix, values in ((".in_sum2", rng.uniform(0.1, 3, (1, n))), (".counts", np.ones((1, 1)))):
            data = values.astype(np.float32).view(np.uint8)
            tensors.append(TensorToWrite(name + suffix, values.shape, "F32", data))
    write_gguf(path, {"general.type": "imatrix"}, tensors)
    return path


def test_a_mix(q4_k_m: Path) -> None:
    file = open_gguf(q4_k_m)
    kinds = {info.type for info in file.tensors.values()}
    assert kinds == {"F32", "Q4_K", "Q6_K"}
    assert file.metadata["general.file_type"] == 15
    assert file.metadata["general.quantization_version"] == 2
    model = qjax.load(q4_k_m)
    assert "".join(model.generate("def main(", max_tokens=4, temperature=0.0))


def test_the_plan_is_what_is_written(q4_k_m: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "embedded", "--type", "q4_k_m", "--dry-run", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    file = open_gguf(q4_k_m)
    assert {t["name"]: t["to"] for t in said["tensors"]} == {name: info.type for name, info in file.tensors.items()}
    assert said["bytes"] == sum(info.nbytes for info in file.tensors.values())


def test_high_effort(tmp_path: Path) -> None:
    """The same types and size, and weights nearer to the floats."""
    floats = open_gguf(locate("embedded"))
    made = {}
    for effort in ("normal", "high"):
        path = tmp_path / f"{effort}.gguf"
        assert main(["quantize", "embedded", "--type", "q4_0", "-o", str(path), "--effort", effort]) == 0
        made[effort] = open_gguf(path)
    assert {n: i.type for n, i in made["high"].tensors.items()} == {
        n: i.type for n, i in made["normal"].tensors.items()
    }
    for name, info in made["high"].tensors.items():
        if info.type == "Q4_0":
            w = np.asarray(read_array(floats, name, apply_scale=False), np.float32)
            read = {e: oracle.dequantize(f.raw(name), GGMLQuantizationType.Q4_0) for e, f in made.items()}
            errors = {e: float(((back - w) ** 2).sum()) for e, back in read.items()}
            assert errors["high"] < 0.95 * errors["normal"], name


def test_importance(tmp_path: Path, q4_k_m: Path) -> None:
    file = open_gguf(q4_k_m)
    known = {name: info.shape[-1] for name, info in file.tensors.items() if len(info.shape) == 2}
    missing = "blk.1.attn_k.weight"
    del known[missing]
    imatrix = importance_file(tmp_path / "i.gguf", known)
    with pytest.warns(QjaxWarning, match=missing):
        quantize_file("embedded", tmp_path / "i-q4_k_m.gguf", Wish("q4_k_m"), imatrix=imatrix)
    ours = open_gguf(tmp_path / "i-q4_k_m.gguf")
    assert ours.metadata["quantize.imatrix.entries_count"] == len(known)
    np.testing.assert_array_equal(ours.raw(missing), file.raw(missing))
    assert (ours.raw("blk.0.ffn_up.weight") != file.raw("blk.0.ffn_up.weight")).any()


def test_refuses(tmp_path: Path, q4_k_m: Path) -> None:
    target = tmp_path / "out.gguf"
    wrong = importance_file(tmp_path / "wrong.gguf", {"blk.0.ffn_up.weight": 8})
    for call, words in (
        (lambda: quantize_file(q4_k_m, target, Wish("q3_k_s")), "allow-requantize"),
        (lambda: quantize_file("embedded", target, Wish("iq2_xxs")), "does not make yet"),
        (lambda: quantize_file("embedded", target, Wish("q9")), "not known"),
        (lambda: quantize_file("embedded", target, Wish("q9.yaml")), "q9.yaml: expected a readable YAML file"),
        (lambda: quantize_file("embedded", target, Wish("q4_k_m"), imatrix=wrong), "another model"),
        (lambda: quantize_file("embedded", target, Wish("q4_k_m", output_type="q9", embedding_type="q9")), "ggml type"),
    ):
        with pytest.raises(QjaxError, match=words):
            call()
        assert not target.exists()
    assert main(["quantize", "embedded", "--type", "q4_k_m"]) == 2


def test_requantize(tmp_path: Path, q4_k_m: Path) -> None:
    _, tensors = plan_file(q4_k_m, Wish("q8_0"), requantize=True)
    assert {tensor.source for tensor in tensors} == {"F32", "Q4_K", "Q6_K"}
    quantize_file(q4_k_m, tmp_path / "q8.gguf", Wish("q8_0"), requantize=True)
    assert qjax.load(tmp_path / "q8.gguf").config == qjax.load(q4_k_m).config


def test_while_loading(q4_k_m: Path) -> None:
    """In place of a file between: the same packed arrays."""
    ours, theirs = qjax.load("embedded", quantize="Q4_K_M").params, qjax.load(q4_k_m).params
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(QjaxError, match="for a mix"):
        qjax.load("embedded", quantize="q4_0", imatrix="i.gguf")
    with pytest.raises(QjaxError, match="does not make yet"):
        qjax.load("embedded", quantize="iq2_xxs")


def test_while_loading_by_importance(tmp_path: Path) -> None:
    """What the matrix does not hold is named, and one of another model is refused, as for a file."""
    shapes = {name: info.shape for name, info in open_gguf(qjax.load("embedded").source).tensors.items()}
    known = {name: shape[-1] for name, shape in shapes.items() if len(shape) == 2}
    del known["blk.1.attn_k.weight"]
    imatrix = importance_file(tmp_path / "i.gguf", known)
    with pytest.warns(QjaxWarning, match=r"blk\.1\.attn_k\.weight"):
        loaded = qjax.load("embedded", quantize="q4_k_m", imatrix=imatrix).params
    with pytest.warns(QjaxWarning, match=r"blk\.1\.attn_k\.weight"):
        quantize_file("embedded", tmp_path / "q.gguf", Wish("q4_k_m"), imatrix=imatrix)
    written = qjax.load(tmp_path / "q.gguf").params
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(written), strict=True):
        np.testing.assert_array_equal(a, b)
    wrong = importance_file(tmp_path / "wrong.gguf", {"blk.0.ffn_up.weight": 8})
    with pytest.raises(QjaxError, match="another model"):
        qjax.load("embedded", quantize="q4_k_m", imatrix=wrong)


# The process dies in the middle of the run, when it is about to make its tenth tensor of blocks.
KILLED = """
import os, signal, sys
import qjax.models.rewrite as module
from qjax.cli import main
encode, calls = module.encode, []
def dying(*args):
    calls.append(args)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args)
module.encode = dying
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(
    tmp_path: Path, q4_k_m: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.gguf"
    argv = ["quantize", "embedded", "-o", str(path), "--type", "q4_k_m", "--json"]
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    made: list[str] = []

    def counted(kind: str, *args: Any) -> Any:
        made.append(kind)
        return encode(kind, *args)

    encode = rewrite.encode
    monkeypatch.setattr(rewrite, "encode", counted)
    assert main(argv) == 0
    blocks = sum(info.type != "F32" for info in open_gguf(q4_k_m).tensors.values())
    assert len(made) == blocks - 9
    assert path.read_bytes() == q4_k_m.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    said = capsys.readouterr()
    resumed = json.loads(said.out)["resumed"]
    assert 9 <= resumed < len(open_gguf(path).tensors)
    assert f"resuming: {resumed} of {len(open_gguf(path).tensors)} tensors are done" in said.err


def test_what_is_done_counts_for_the_same_wish_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source = tmp_path / "out.gguf", tmp_path / "source.gguf"
    source.write_bytes(qjax.load("embedded").source.read_bytes())

    wish = Wish("q8_0")
    shapes = {name: info.shape for name, info in open_gguf(source).tensors.items()}
    imatrix = importance_file(tmp_path / "i.gguf", {n: s[-1] for n, s in shapes.items() if len(s) == 2})

    def resumed(wish: Wish, touched: bool = False, **options: Any) -> int:
        """How many tensors a run finds, after one that is stopped at its third tensor of blocks."""
        calls: list[str] = []

        def stopping(kind: str, *args: Any) -> Any:
            calls.append(kind)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode(kind, *args)

        encode = rewrite.encode
        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "encode", stopping)
            with pytest.raises(KeyboardInterrupt):
                quantize_file(source, path, Wish("q8_0"))
        if touched:
            source.touch()
        return quantize_file(source, path, wish, **options)["resumed"]

    assert resumed(wish) == 3
    assert resumed(wish, fresh=True) == 0
    assert resumed(wish, touched=True) == 0
    assert resumed(wish._replace(embedding_type="q4_0")) == 0
    assert resumed(wish, imatrix=imatrix) == 0
    assert resumed(wish, split_max_bytes=10**6) == 0
    assert not list(tmp_path.glob(".*"))


def test_experts(tmp_path: Path) -> None:
    """A model that qjax does not run: 8 experts, each by its own importance; gates are kept."""
    rng = np.random.default_rng(0)
    shapes = {"attn_v": (64, 256), "ffn_gate_inp": (8, 256), "ffn_up_exps": (8, 16, 256), "ffn_down_exps": (8, 256, 32)}
    weights = {f"blk.0.{name}.weight": rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.expert_count": 8}
    tensors = [TensorToWrite(name, w.shape, "F16", w.view(np.uint8)) for name, w in weights.items()]
    write_gguf(tmp_path / "f.gguf", metadata, tensors)
    up = "blk.0.ffn_up_exps.weight"
    importance = rng.uniform(0.1, 3, (8, 256)).astype(np.float32)
    write_gguf(
        tmp_path / "i.gguf",
        {"general.type": "imatrix"},
        [
            TensorToWrite(f"{up}.in_sum2", importance.shape, "F32", importance.view(np.uint8)),
            TensorToWrite(f"{up}.counts", (8, 1), "F32", np.ones((8, 1), np.float32).view(np.uint8)),
        ],
    )
    with pytest.warns(QjaxWarning, match="without importance"):
        quantize_file(tmp_path / "f.gguf", tmp_path / "q.gguf", Wish("q4_k_m"), imatrix=tmp_path / "i.gguf")
    file = open_gguf(tmp_path / "q.gguf")
    assert [info.type for info in file.tensors.values()] == ["Q8_0", "F16", "Q4_K", "Q8_0"]
    np.testing.assert_array_equal(file.raw(up), encode("Q4_K", weights[up], importance))
    again = tmp_path / "again.gguf"
    quantize_file(tmp_path / "q.gguf", again, Wish("q8_0"), requantize=True)
    assert open_gguf(again).tensors[up].shape == (8, 16, 256)


@pytest.mark.parametrize(("name", "mebibytes"), [("llama-70b", 39503.23), ("mixtral-8x7b", 27127.87)])
def test_a_dry_run_reads_only_the_header(name: str, mebibytes: float, tmp_path: Path) -> None:
    """Of a file of 129 GiB without a weight on the disk; the sizes are those that llama-quantize --dry-run says."""
    tool = runpy.run_path(str(ROOT / "tests/formats/gguf/make_mix_goldens.py"))
    path = tool["write_model"](tmp_path / "model.gguf", name)
    start = time.process_time()
    made = dry_run(path, Wish("q4_k_m"))
    assert time.process_time() - start < 2
    assert round(made["bytes"] / 2**20, 2) == mebibytes
    with pytest.warns(QjaxWarning, match="does not make yet"):
        dry_run(path, Wish("q1_0"))


def test_a_mix_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line, while loading, and with overrides in a file."""
    (tmp_path / "own.yaml").write_text("base: q8_0\nrules: [{role: ffn_down, type: q5_0, when: first 1/2}]")
    (tmp_path / "types.txt").write_text("attn_q=q4_0\nattn_[kv]=q4_1")
    own = str(tmp_path / "own.yaml")
    loaded = qjax.load("embedded", quantize=own).params
    quantize_file("embedded", tmp_path / "q.gguf", Wish(own))
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(qjax.load(tmp_path / "q.gguf").params), strict=True):
        np.testing.assert_array_equal(a, b)
    options = ["--tensor-type", "attn_v=q5_1", "--tensor-type-file", str(tmp_path / "types.txt"), "--dry-run", "--json"]
    assert main(["quantize", "embedded", "--type", own, *options]) == 0
    kinds = {t["name"]: t["to"] for t in json.loads(capsys.readouterr().out)["tensors"]}
    assert [kinds[f"blk.{i}.ffn_down.weight"] for i in range(4)] == ["Q5_0", "Q5_0", "Q8_0", "Q8_0"]
    assert [kinds[f"blk.3.attn_{role}.weight"] for role in "qkv"] == ["Q4_0", "Q4_1", "Q5_1"]
    (tmp_path / "own.yaml").write_text("base: q8_0\nrule: []")
    assert main(["quantize", "embedded", "--type", own, "--dry-run"]) == 2
    assert "own.yaml: unknown key 'rule'" in capsys.readouterr().err


def test_the_config_in_the_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`qjax run` makes the file that the same wishes make on the command line; paths are relative to the config."""
    text = (ROOT / "configs/quantize.yaml").read_text()
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "quantize.yaml"
    config.write_text(text)
    made = run(config)
    assert made.resolve() == tmp_path / "runs/quantize/embedded-q4_k_m.gguf"
    target = tmp_path / "q.gguf"
    wishes = ["--tensor-type", r"blk\.0\.ffn_down=q6_k", "--tensor-type", "attn_output=q5_k"]
    assert main(["quantize", "embedded", "-o", str(target), "--type", "q4_k_m", *wishes]) == 0
    assert made.read_bytes() == target.read_bytes()
    # A source, a mix and an importance matrix that lie beside the config.
    (tmp_path / "configs/own.yaml").write_text("base: q8_0")
    made.rename(tmp_path / "configs/f.gguf")
    config.write_text("{kind: quantize, source: f.gguf, output: o.gguf, type: own.yaml, allow_requantize: true}")
    assert {info.type for info in open_gguf(run(config)).tensors.values()} == {"F32", "Q8_0", "Q6_K"}
    config.write_text("{kind: quantize, source: f.gguf, output: o.gguf, type: q4_0, imatrix: i.gguf}")
    with pytest.raises(QjaxError, match=r"configs.i\.gguf"):
        run(config)
    config.write_text("{kind: quantize, source: f.gguf, output: o.gguf, type: q4_0, tensor_types: ffn=q8_0}")
    with pytest.raises(QjaxError, match="tensor_types: expected a list of str"):
        run(config)


MEASURED = """
import sys
from pathlib import Path
from qjax.cli import main
assert main(sys.argv[1:]) == 0
[peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0"])
def test_a_model_of_half_a_gigabyte_takes_the_memory_of_two_tensors(tmp_path: Path, kind: str) -> None:
    """Beside what a small model of the same code takes, which is JAX and compiled programs."""

    def peak(source: str | Path) -> int:
        argv = [
            sys.executable,
            "-c",
            MEASURED,
            "quantize",
            str(source),
            "-o",
            str(tmp_path / "out.gguf"),
            "--type",
            kind,
        ]
        # One device, as a user has.
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        done = subprocess.run(argv, env=env, check=True, capture_output=True, text=True)
        return 1024 * int(done.stdout.split()[-1])

    config = llama(layers=6, hidden=2048, heads=32, kv_heads=4, ffn=5632, vocab=4096, context=64)
    assert save_synthetic(tmp_path / "f16.gguf", Shape("half", config), "f16") > 500e6
    beside = peak(tmp_path / "f16.gguf") - peak("embedded")
    assert beside < 2 * 4 * config.ffn * config.hidden, f"{beside / 1e6:.0f} MB"
