"""What a model is calibrated on: every form gives the same samples, drawn by a seed; what is no data is said."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.calibrate.data import Calibration, calibration_tokens, wikitext
from qjax.errors import QjaxError, QjaxWarning
from qjax.models.chunks import begun, chunks_of

TEXT = Path(__file__).parents[2] / "LICENSE"


def tokens(model: Any, data: Any, **options: Any) -> np.ndarray:
    return calibration_tokens(Calibration(data, **options), lambda: model.tokenizer, model.config)


def no_tokenizer() -> Any:
    raise AssertionError("token ids need none")


@pytest.fixture(scope="module")
def ids(model: Any) -> np.ndarray:
    return np.array(model.encode(TEXT.read_text(encoding="utf-8")))


def test_a_text_is_cut_as_when_its_perplexity_is_measured(model: Any, ids: np.ndarray) -> None:
    bos = model.tokenizer.first_id
    whole = begun(chunks_of(model.config, ids, n_ctx=64, bos_id=bos, chunks=None), bos)
    with pytest.warns(QjaxWarning, match=f"LICENSE: {len(whole)} samples of 64 tokens, fewer than the 999 asked for"):
        np.testing.assert_array_equal(tokens(model, TEXT, samples=999, seq_len=64), whole)
    few = tokens(model, TEXT, samples=5, seq_len=64)
    assert few.dtype == np.int32
    at = [int(np.flatnonzero((whole == row).all(1))[0]) for row in few]
    assert at == sorted(set(at))
    assert np.array_equal(few, tokens(model, str(TEXT), samples=5, seq_len=64))
    assert not np.array_equal(few, tokens(model, TEXT, samples=5, seq_len=64, seed=1))
    assert tokens(model, TEXT, samples=3).shape == (3, 512)


def test_documents(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path.write_text(
        "\n".join([json.dumps({"text": "import sys\n" * 9}), "", json.dumps({"text": "x = 1\n" * 9})]), encoding="utf-8"
    )
    want = [*model.encode("import sys\n" * 9), *model.encode("x = 1\n" * 9)]
    found = tokens(model, path, samples=1, seq_len=len(want))[0]
    np.testing.assert_array_equal(found[1:], want[1:])
    path.write_text(json.dumps({"messages": said}), encoding="utf-8")
    with pytest.warns(QjaxWarning, match="no chat template"):
        found = tokens(model, path, samples=1, seq_len=14)
    assert "hello" in model.tokenizer.decode(found[0].tolist())
    for line, words in (
        ('{"txt": "a"}', "expected"),
        ("[1, 2]", "expected"),
        ('{"text": 3}', "expected"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [3]}', "expected"),
    ):
        path.write_text('{"text": "a"}\n' + line, encoding="utf-8")
        with pytest.raises(QjaxError, match=rf"d\.jsonl: line 2: {words}"):
            tokens(model, path)


def test_token_files(model: Any, ids: np.ndarray, tmp_path: Path) -> None:
    """Taken as they are: what begins a sample is not replaced."""
    rows = ids[: 6 * 50].reshape(6, 50).astype(np.int32)
    np.save(tmp_path / "r.npy", rows)
    np.savez(tmp_path / "r.npz", tokens=rows)
    (tmp_path / "r.json").write_text(json.dumps(rows.tolist()), encoding="utf-8")
    (tmp_path / "one.json").write_text(json.dumps(rows.reshape(-1).tolist()), encoding="utf-8")
    (tmp_path / "ragged.json").write_text(
        json.dumps([ids[:70].tolist(), [1, 2], ids[70:103].tolist()]), encoding="utf-8"
    )
    of = lambda name, **options: calibration_tokens(
        Calibration(tmp_path / name if isinstance(name, str) else name, samples=6, **options),
        no_tokenizer,
        model.config,
    )
    for data in ("r.npy", "r.npz", "r.json", rows):
        np.testing.assert_array_equal(of(data), rows)
    np.testing.assert_array_equal(of("one.json", seq_len=50), rows)
    with pytest.warns(QjaxWarning, match="3 samples of 30"):
        np.testing.assert_array_equal(
            of("ragged.json", seq_len=30), np.concatenate([ids[:60], ids[70:100]]).reshape(3, 30)
        )


def test_what_is_no_data(model: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    np.save(tmp_path / "float.npy", np.ones(100))
    np.save(tmp_path / "object.npy", np.array([None, 1]), allow_pickle=True)
    np.save(tmp_path / "cut.npy", np.ones(100, np.int32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:200])
    huge = np.lib.format.magic(1, 0) + (76).to_bytes(2, "little")
    (tmp_path / "huge.npy").write_bytes(
        huge + b"{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999,), }".ljust(75) + b"\n"
    )
    np.savez(tmp_path / "two.npz", a=np.ones(9, np.int32), b=np.ones(9, np.int32))
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 no zip")
    for name, text in (("words.json", '["a"]'), ("deep.json", "[" * 100_000), ("none.json", "[]"), ("map.json", "{}")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, words in (
        ("short.txt", r"short\.txt: \d+ tokens, fewer than one sample of 512"),
        ("binary.txt", "not UTF-8"),
        ("missing.txt", "cannot read"),
        ("missing.npy", "cannot be read as token ids"),
        ("float.npy", "expected whole numbers"),
        ("object.npy", "cannot be read as token ids"),
        ("cut.npy", "cannot be read as token ids"),
        ("huge.npy", "cannot be read as token ids"),
        ("two.npz", "expected one array of token ids, got a, b"),
        ("no.npz", "cannot be read as token ids"),
        ("words.json", "expected whole numbers"),
        ("deep.json", "cannot be read as token ids"),
        ("none.json", "expected whole numbers"),
        ("map.json", "expected whole numbers"),
    ):
        with pytest.raises(QjaxError, match=words):
            tokens(model, tmp_path / name)
    for options, words in (
        ({"seq_len": 513}, "samples of 2 to 512 tokens, the model's context, got 513"),
        ({"seq_len": 1}, "samples of 2"),
        ({"samples": 0}, "at least one sample"),
    ):
        with pytest.raises(QjaxError, match=words):
            tokens(model, TEXT, **options)
    with pytest.raises(QjaxError, match="no calibration data"):
        tokens(model, None)
    with pytest.raises(QjaxError, match="token id 2048 is not in the model's vocabulary of 2048"):
        tokens(model, np.full(600, 2048))


def test_wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder that llama.cpp's script makes, else of its archive on the Hub."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", "from the Hub")

    def download(**options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        assert (options["repo_id"], options["filename"]) == ("ggml-org/ci", "wikitext-2-raw-v1.zip")
        return str(tmp_path / "w.zip")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert wikitext() == "from the Hub"
    (tmp_path / "w.zip").write_bytes(b"no archive")
    with pytest.raises(QjaxError, match=r"w\.zip: cannot be read"):
        wikitext()

    def refuse(**options: Any) -> str:
        raise LocalEntryNotFoundError("no way to the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(QjaxError, match="cannot be fetched from the Hub: no way to the Hub"):
        wikitext()
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.train.raw").write_text("from here", encoding="utf-8")
    assert wikitext() == "from here"
