"""`qjax quantize`: a float file to mixes, with and without importance, and what it refuses."""

import json
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
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.plan import Wish
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.formats.locate import locate
from qjax.models.load import read_array
from qjax.runs.quantize import plan_file, quantize_file


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
