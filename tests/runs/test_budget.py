"""`qjax quantize --target-bpw`: what fits, what it is expected to cost, and that it beats a mix of the same size."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.calibrate.budget import SUPER_BLOCKED, choices, fit, stored
from qjax.calibrate.fisher import each
from qjax.cli import main
from qjax.errors import QjaxError
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.plan import Wish
from qjax.formats.locate import EMBEDDED
from qjax.formats.source import open_source
from qjax.runs import run
from qjax.runs.budget import Budget, candidates, quantize_within
from qjax.runs.quantize import quantize_file
from qjax.runs.texts import measure_perplexity
from qjax.text.files import read_text

KINDS = "Q3_K,Q4_K,Q5_K,Q6_K"
TEXT = Path(argparse.__file__)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The embedded model in 4.6 bits a weight, looked at on text that it writes itself."""
    path = tmp_path_factory.mktemp("budget") / "q.gguf"
    with pytest.MonkeyPatch.context() as patch:
        # Many short texts side by side are written faster than one long one, token by token.
        patch.setattr("qjax.runs.budget.N_CTX", 128)
        return quantize_within("embedded", path, Wish("q4_k_m"), Budget(bpw=4.6, chunks=4, types=KINDS.split(",")))


def test_it_fits_and_says_what_it_costs(made: dict[str, Any]) -> None:
    assert 4.5 < made["bits_per_weight"] <= 4.6
    file = open_gguf(made["path"])
    kinds = {info.type for info in file.tensors.values()}
    assert {"Q3_K", "Q4_K"} < kinds <= {"F32", *KINDS.split(",")}
    assert file.metadata["general.file_type"] == 15
    assert made["expected_kld"] == pytest.approx(made["measured_kld"], rel=0.5)
    model = qjax.load(made["path"])
    assert "".join(model.generate("def main(", max_tokens=4, temperature=0.0))


@pytest.mark.slow
def test_it_beats_a_mix_of_its_size(made: dict[str, Any], tmp_path: Path) -> None:
    """On another text than that which it was looked at on."""
    mix, best = tmp_path / "mix.gguf", tmp_path / "best.gguf"
    size = quantize_file("embedded", mix, Wish("q4_k_m"), imatrix=made["imatrix"])["bytes"]
    bpw = size * 8 / sum(np.prod(info.shape) for info in open_gguf(mix).tensors.values())
    argv = ["embedded", "-o", str(best), "--target-bpw", str(bpw), "--imatrix", made["imatrix"], "--types", KINDS]
    assert main(["quantize", *argv]) == 0
    assert sum(info.nbytes for info in open_gguf(best).tensors.values()) <= size
    base = str(tmp_path / "base.kld")
    data = ["--data", str(TEXT), "--ctx", "256", "--chunks", "12", "--kl-base", base]
    assert main(["perplexity", "embedded", *data, "--save-kl-base"]) == 0

    def divergence(path: Path) -> float:
        return measure_perplexity(qjax.load(path), read_text(TEXT), ctx=256, chunks=12, kl_base=base)["mean_kld"]

    assert divergence(best) < 0.85 * divergence(mix)


def test_what_was_found_is_used_again(made: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """From the file beside the target, without looking at the model; some types fixed by name."""
    assert each(read_imatrix(made["imatrix"]))
    argv = ["quantize", "embedded", "--dry-run", "--json", "--imatrix", made["imatrix"], "--types", KINDS]
    assert main([*argv, "--target-bpw", "4.6"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["expected_kld"] == pytest.approx(made["expected_kld"])
    assert {t["name"]: t["to"] for t in said["tensors"]} == {t["name"]: t["to"] for t in made["tensors"]}


def test_a_size_is_that_of_the_file(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.gguf"
    argv = ["quantize", "embedded", "-o", str(path), "--json", "--imatrix", made["imatrix"], "--types", KINDS]
    assert main([*argv, "--target-size", "2300KB", "--tensor-type", "attn_v=q8_0"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {t["to"] for t in said["tensors"] if "attn_v" in t["name"]} == {"Q8_0"}
    assert said["bytes"] < 2_300_000
    assert 2_200_000 < path.stat().st_size <= 2_300_000


def test_what_is_chosen_from_unless_told() -> None:
    assert candidates(open_source(EMBEDDED), Wish("q4_k_m"), None)["blk.0.attn_q.weight"] == list(SUPER_BLOCKED)


def test_what_cannot_be(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quantize", "embedded", "-o", str(tmp_path / "q.gguf"), "--imatrix", made["imatrix"]]
    for more, said in (
        (["--target-bpw", "1.5", "--types", "q8_0"], "the smallest types take"),
        (["--target-size", "10KB"], "the budget leaves nothing"),
        (["--target-bpw", "4", "--types", "q9_z"], "expected a ggml type"),
        (["--target-bpw", "4", "--target-size", "1MB"], "not allowed with"),
        (["--data", "x.txt", "--type", "q4_0"], "is for a budget"),
        ([], "give --type, or --method, or a budget"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QJAX_CACHE", "off")
            try:
                code = main([*argv, *more])
            except SystemExit as end:
                code = end.code
        assert code == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_matrix_that_nothing_is_known_of() -> None:
    file = open_gguf(qjax.load("embedded").source)
    with pytest.raises(QjaxError, match=r"nothing is known of how much blk\.0\.attn_q\.weight"):
        choices(file, {"blk.0.attn_q.weight": ["Q4_K"]}, {}, {})


def test_the_least_and_the_most(made: dict[str, Any]) -> None:
    file = open_gguf(qjax.load("embedded").source)
    names = [name for name in file.tensors if "attn_v" in name]
    found = read_imatrix(made["imatrix"])
    of = choices(file, dict.fromkeys(names, ("Q3_K", "Q6_K", "F16")), each(found), found.of)
    small, large = (sum(stored(kind, file.tensors[name].shape) for name in names) for kind in ("Q3_K", "F16"))
    assert set(fit(of, small).types.values()) == {"Q3_K"}
    assert set(fit(of, large).types.values()) == {"F16"}
    assert fit(of, large).divergence == pytest.approx(0, abs=1e-7)
    for kinds in of.values():
        losses = [choice.loss for choice in kinds]
        assert losses == sorted(losses, reverse=True)


def test_from_a_config(made: dict[str, Any], tmp_path: Path) -> None:
    """`qjax run` makes what the command line does."""
    config = tmp_path / "c.yaml"
    (tmp_path / "i.gguf").write_bytes(Path(made["imatrix"]).read_bytes())
    text = "{kind: quantize, source: embedded, output: o.gguf, imatrix: i.gguf, types: [Q3_K, q4_k, Q5_K, Q6_K], %s}"
    config.write_text(text % "target_bpw: 4.6")
    kinds = {name: info.type for name, info in open_gguf(run(config)).tensors.items()}
    assert kinds == {t["name"]: t["to"] for t in made["tensors"]}
    for more, said in (
        ("pure: false", "give a type, a method, or a budget"),
        ("target_bpw: 4.6, target_size: 2MB", "two budgets"),
    ):
        config.write_text(text % more)
        with pytest.raises(QjaxError, match=said):
            run(config)
