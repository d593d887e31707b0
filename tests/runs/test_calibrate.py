"""`qjax calibrate`: a file like llama-imatrix's, whole or not at all, and runs that were killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.cli import main
from qjax.errors import QjaxError
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.plan import Wish
from qjax.runs.calibrate import calibrate, merge_files
from qjax.runs.quantize import quantize_file

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"
OPTIONS = {"ctx": 128, "chunks": 6}

# Dies by its own hand, as by `kill -9`: after the fourth chunk, whose state is not on the disk yet, or while the state
# of the second is written.
KILLED = """
import os, signal, sys
from qjax.runs.calibrate import calibrate
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "computing":
    stop = lambda done, total, rate: die() if done == 4 else None
else:
    def stop(done, total, rate):
        if done == 2:
            os.fsync = die
calibrate("embedded", sys.argv[1], sys.argv[2], ctx=128, chunks=6, save_every=0.0, progress=stop)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "imatrix.gguf"
    calibrate("embedded", TEXT, path, **OPTIONS)
    return path


def killed(path: Path, when: str) -> None:
    command = [sys.executable, "-c", KILLED, str(TEXT), str(path), when]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(("when", "kept"), [("computing", 3), ("writing", 1)])
def test_a_killed_run_goes_on(tmp_path: Path, whole: Path, when: str, kept: int) -> None:
    path, partial = tmp_path / "imatrix.gguf", tmp_path / "imatrix.gguf.partial"
    killed(path, when)
    assert not path.exists()
    assert read_imatrix(partial).chunks == kept
    told: list[int] = []
    result = calibrate("embedded", TEXT, path, **OPTIONS, progress=lambda done, total, rate: told.append(done))
    assert told == list(range(kept, 7))
    assert result["resumed_chunks"] == kept
    assert path.read_bytes() == whole.read_bytes()
    # Neither the state nor half a file is left.
    assert list(tmp_path.iterdir()) == [path]


class Stopped(Exception):
    pass


def stopped(path: Path, after: int = 2) -> None:
    def stop(done: int, total: int, rate: float) -> None:
        if done == after:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate("embedded", TEXT, path, **OPTIONS, save_every=0.0, progress=stop)


def test_an_unfinished_run_of_something_else(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, partial = tmp_path / "i.gguf", tmp_path / "i.gguf.partial"
    stopped(path)
    before = partial.read_bytes()
    other_text, other_model = tmp_path / "other.txt", tmp_path / "other.gguf"
    other_text.write_text(TEXT.read_text(encoding="utf-8") + " ", encoding="utf-8")
    qjax.save(qjax.load("embedded"), other_model)
    for model, data, more, word in (
        ("embedded", other_text, {}, "text"),
        (str(other_model), TEXT, {}, "model"),
        ("embedded", TEXT, {"ctx": 64}, "options"),
        ("embedded", TEXT, {"output": True}, "options"),
    ):
        with pytest.raises(QjaxError, match=f"another {word}: --fresh"):
            calibrate(model, data, path, **{**OPTIONS, **more})
    partial.write_bytes(before[:1000])
    with pytest.raises(QjaxError, match="--fresh"):
        calibrate("embedded", TEXT, path, **OPTIONS)
    assert not path.exists()
    arguments = ["calibrate", "embedded", "--data", str(TEXT), "-o", str(path), "--ctx", "128", "--chunks", "6"]
    assert main([*arguments, "--fresh", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["entries"], said["chunks"], said["ctx"], said["resumed_chunks"]) == (28, 6, 128, 0)
    assert said["tokens"] == 6 * 128
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_the_file(whole: Path, tmp_path: Path) -> None:
    """Has the keys, types and tensors of llama-imatrix's, in its order, and serves to quantize by."""
    golden = ROOT / "tests" / "calibrate" / "imatrix.gguf"
    ours, theirs = open_gguf(whole), open_gguf(golden)
    assert dict(ours.metadata) == {**theirs.metadata, "imatrix.datasets": [str(TEXT)]}
    assert dict(ours.metadata_types) == dict(theirs.metadata_types)
    describe = lambda file: [(name, info.shape, info.type) for name, info in file.tensors.items()]
    assert describe(ours) == describe(theirs)
    calibrate("embedded", TEXT, tmp_path / "b.gguf", **OPTIONS, batch=4)
    assert read_imatrix(tmp_path / "b.gguf").chunks == 6
    quantize_file("embedded", tmp_path / "q.gguf", Wish("q4_0"), imatrix=whole)
    assert open_gguf(tmp_path / "q.gguf").metadata["quantize.imatrix.entries_count"] == 28


def test_merging_the_parts_of_a_text(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twice.gguf"
    assert main(["calibrate", "--merge", str(whole), str(whole), "-o", str(path), "--ctx", "128", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["chunks"], said["datasets"]) == (12, [str(TEXT)] * 2)
    once, twice = read_imatrix(whole), read_imatrix(path)
    for name, sums in once.sums.items():
        assert (twice.sums[name] == 2 * sums).all()
        assert twice.counts[name] == 12 * 128
    with pytest.raises(QjaxError, match="nowhere"):
        merge_files([str(tmp_path / "nowhere.gguf")], path, ctx=128)


def test_showing_one(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--show", str(whole)]) == 0
    assert "blk.3.ffn_gate, ffn_up" in capsys.readouterr().out
    assert main(["calibrate", "--show", str(whole), "--json"]) == 0
    inputs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["inputs"]
    assert len(inputs) == 16
    assert inputs[0]["names"] == [f"blk.0.attn_{x}.weight" for x in "kqv"]


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    bare = tmp_path / "bare.gguf"
    model = qjax.load("embedded")
    qjax.save(
        qjax.Model(
            model.params, model.config, {k: v for k, v in model.metadata.items() if "tokenizer" not in k}, {}, bare
        ),
        bare,
    )
    layers = [{**model.params["layers"][0], "attn_norm": np.full(model.config.hidden, np.inf, np.float32)}]
    damaged = tmp_path / "damaged.gguf"
    qjax.save(
        dataclasses.replace(model, params={**model.params, "layers": layers + model.params["layers"][1:]}), damaged
    )
    before = bare.read_bytes()
    for arguments, words in (
        (["embedded", "--data", tmp_path / "short.txt"], "fewer than one chunk of 512"),
        (["embedded", "--data", tmp_path / "binary.txt"], "not UTF-8"),
        (["embedded", "--data", tmp_path / "missing.txt"], "missing.txt"),
        (["embedded", "--data", TEXT, "--ctx", "4096"], "context"),
        (["embedded", "--data", TEXT, "-o", tmp_path], "is a directory"),
        (["embedded", "--data", TEXT, "-o", tmp_path / "no" / "i.gguf"], "make it first"),
        ([bare, "--data", TEXT], "tokenizer"),
        ([bare, "--data", TEXT, "-o", bare], "is read by this run"),
        ([damaged, "--data", TEXT, "--ctx", "128"], "damaged.gguf: blk.0.attn_q.weight"),
        (["embedded"], "--data"),
        ([], "one of them"),
        (["embedded", "--show", bare], "one of them"),
        (["--show", bare], "no importance matrix"),
        (["embedded", "--data", TEXT, "--save-every", "soon"], "expected a number"),
    ):
        output = [] if "-o" in arguments else ["-o", tmp_path / "i.gguf"]
        try:
            code: Any = main(["calibrate", *map(str, [*arguments, *output])])
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        assert code == 2, arguments
        assert words in error
        assert error.count("\n") == 1
    assert bare.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt", "binary.txt", "bare.gguf", "damaged.gguf"}


def test_of_gradients(tmp_path: Path) -> None:
    """Fisher information, of all matrices, with a run that goes on; two texts' are added up, of another kind not."""
    path, again, merged = (tmp_path / name for name in ("f.gguf", "again.gguf", "m.gguf"))
    options = {"ctx": 64, "chunks": 2, "of_gradients": True}
    found = calibrate("embedded", TEXT, path, **options)
    matrices = {name for name, info in open_gguf(qjax.load("embedded").source).tensors.items() if len(info.shape) == 2}
    assert read_imatrix(path).row_sums.keys() == matrices
    assert found["entries"] == len(matrices)

    def stop(done: int, total: int, rate: float) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate("embedded", TEXT, again, **options, save_every=0.0, progress=stop)
    assert calibrate("embedded", TEXT, again, **options)["resumed_chunks"] == 1
    assert again.read_bytes() == path.read_bytes()
    merge_files([str(path), str(again)], merged, ctx=64)
    for name, rows in read_imatrix(path).row_sums.items():
        np.testing.assert_allclose(read_imatrix(merged).row_sums[name], 2 * rows, rtol=1e-6)
    calibrate("embedded", TEXT, again, ctx=64, chunks=1)
    with pytest.raises(QjaxError, match="not of one kind"):
        merge_files([str(path), str(again)], merged, ctx=64)
