"""`qjax compare`: its JSON, its table, its files, and what it refuses before any model is run."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qjax.api import convert
from qjax.formats.gguf import open_gguf

Json = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, two quantized copies, and a text."""
    folder = tmp_path_factory.mktemp("compare")
    made = {kind: convert(model, folder / f"tiny-{kind}.gguf", quantize=kind) for kind in ("q8_0", "q4_0", "q4_1")}
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 5, encoding="utf-8")
    return {"f16": model, "text": folder / "text.txt", **made}


def test_the_whole_of_it(run: Any, run_json: Json, files: dict[str, Path], tmp_path: Path) -> None:
    command = ("compare", files["q8_0"], files["f16"], files["q4_0"], files["q4_1"], "--data", files["text"])
    options = ("--ctx", 32, "--chunks", 3, "--bootstrap", 200)
    found = run_json(*command, *options, "--out", tmp_path / "new" / "out")
    assert [row["model"] for row in found["rows"]] == ["tiny-q4_0", "tiny-q4_1", "tiny-q8_0", "model"]
    assert [row["base"] for row in found["rows"]] == [False, False, False, True]
    assert (found["chunks"], found["ctx"]) == (3, 32)
    for row, kind in zip(found["rows"], ("q4_0", "q4_1", "q8_0", "f16"), strict=True):
        assert row["bytes"] == files[kind].stat().st_size
        alone = run_json("perplexity", files[kind], "--data", files["text"], "--ctx", 32, "--chunks", 3)
        assert row["perplexity"] == alone["perplexity"]
        assert row["stderr"] == alone["stderr"]
    assert found["base_perplexity"] == found["rows"][3]["perplexity"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        ("tiny-q4_0", "tiny-q4_1"),
        ("tiny-q4_1", "tiny-q8_0"),
    ]
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["compare.csv", "compare.png"]
    with Path(found["table"]).open(newline="", encoding="utf-8") as table:
        lines = list(csv.DictReader(table))
    assert [line["model"] for line in lines] == [row["model"] for row in found["rows"]]
    assert [float(line["mean_kld"]) for line in lines] == [row["mean_kld"] for row in found["rows"]]
    shown = run(*command, *options, "--out", tmp_path)
    assert shown.code == 0
    for row in found["rows"]:
        assert f"{row['perplexity']:.3f} ± {row['stderr']:.3f}" in shown.out
    assert "model (base)" in shown.out
    assert "4 of 4: tiny-q4_1" in shown.err


@pytest.mark.slow
def test_a_base_that_is_no_candidate_and_a_base_file(run_json: Json, files: dict[str, Path], tmp_path: Path) -> None:
    measured = ("--data", files["text"], "--out", tmp_path)
    # The partner is named by another path of its.
    other_path = files["q8_0"].parent / ".." / files["q8_0"].parent.name / files["q8_0"].name
    command = ("compare", files["q8_0"], files["q4_0"], *measured, "--against", other_path)
    from_model = run_json(*command, "--base", files["f16"], "--ctx", 32)
    assert [row["model"] for row in from_model["rows"]] == ["tiny-q4_0", "tiny-q8_0", "model"]
    assert [(pair["a"], pair["b"]) for pair in from_model["pairs"]] == [("tiny-q4_0", "tiny-q8_0")]
    base = tmp_path / "f16.kld"
    run_json("perplexity", files["f16"], *measured[:2], "--ctx", 32, "--kl-base", base, "--save-kl-base")
    from_file = run_json(*command, "--kl-base", base)
    for ours, theirs in zip(from_file["rows"], from_model["rows"], strict=False):
        same = ["model", "bytes", "perplexity", "mean_kld", "kld_99", "same_top", "pareto"]
        assert [ours[key] for key in same] == [theirs[key] for key in same]
        assert ours["perplexity_ratio"] == pytest.approx(theirs["perplexity_ratio"], rel=1e-3)
    assert from_file["pairs"] == from_model["pairs"]
    assert from_file["ctx"] == 32
    assert from_file["base_perplexity"] == pytest.approx(from_model["base_perplexity"], rel=1e-3)
    alone = run_json("perplexity", files["q4_0"], *measured[:2], "--kl-base", base)
    assert alone["mean_kld"] == from_file["rows"][0]["mean_kld"]
    rounded = run_json(*command, "--kl-base", base, "--activations", "int8")
    assert rounded["rows"] != from_file["rows"]


def test_two_files_of_one_name_are_told_apart(run_json: Json, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(files["q4_0"].read_bytes())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.gguf").write_bytes(files["q8_0"].read_bytes())
    paths = (tmp_path / "a.gguf", tmp_path / "sub" / "a.gguf")
    options = ("--base", files["f16"], "--data", files["text"], "--ctx", 32, "--out", tmp_path)
    found = run_json("compare", *paths, *options)
    assert [row["model"] for row in found["rows"][:2]] == [str(path.resolve()) for path in paths]


def test_refusals(run: Any, model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    text = ("--data", files["text"], "--ctx", 32, "--out", tmp_path / "out")

    def refused(*argv: Any, words: str) -> None:
        result = run("compare", *argv, "--json")
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1, result.err
        assert words in result.err

    refused(files["q8_0"], files["q4_0"], *text, words="none of the models is of float weights")
    refused(files["q8_0"], files["q8_0"], *text, words="given twice")
    refused(files["q8_0"], "missing.gguf", *text, words="missing.gguf: no such file")
    refused(files["q8_0"], *text, "--base", model, "--kl-base", "x.kld", words="one of them")
    refused(files["q8_0"], *text, "--kl-base", tmp_path / "x.kld", words="x.kld: cannot be read")
    refused(model, files["q8_0"], *text, "--against", files["q4_0"], words="is not one of the models")
    (tmp_path / "file").write_bytes(b"")
    refused(model, *text[:4], "--out", tmp_path / "file", words="file: cannot be made a folder")
    data = bytearray(files["q8_0"].read_bytes())
    info = open_gguf(files["q8_0"]).tensors["output_norm.weight"]
    data[info.offset : info.offset + info.nbytes] = b"\xff" * info.nbytes
    (tmp_path / "nan.gguf").write_bytes(data)
    result = run("compare", model, tmp_path / "nan.gguf", *text)
    assert result.code == 2
    assert "nan: the perplexity is no finite number" in result.err
    assert not list((tmp_path / "out").iterdir())
