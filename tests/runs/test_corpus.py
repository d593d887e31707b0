"""The corpus is a function of the Python that runs, and what is held out is never trained on."""

from pathlib import Path

import pytest

from qjax.errors import QjaxError
from qjax.runs import corpus


def test_the_rule_gives_the_same_sorted_files_each_time() -> None:
    files = corpus.training_files()
    assert files == corpus.training_files() == sorted(set(files))
    assert 300 < len(files) < 1000


def test_held_out_files_exist_and_are_disjoint_from_training() -> None:
    assert set(corpus.HELD_OUT) <= set(corpus.corpus_files())
    assert not set(corpus.HELD_OUT) & set(corpus.training_files())
    texts = [corpus.read_file(name) for name in corpus.HELD_OUT]
    assert all(text in corpus.heldout_text() for text in texts)


def test_no_tests_packages_or_generated_files() -> None:
    for name in corpus.training_files():
        assert not {"test", "tests", "site-packages", "encodings"} & set(name.split("/")[:-1])
        assert not name.startswith("_sysconfigdata")


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("one.py", "two.py", "tests/three.py", "four.txt"):
        (tmp_path / name).write_bytes(b"x = 1\r\n")
    assert corpus.training_files(tmp_path, ("two.py",)) == ["one.py"]
    assert corpus.heldout_text(tmp_path, ("two.py",)) == "x = 1\n"


def test_a_coding_cookie_is_obeyed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# coding: latin-1\nx = 'ä'\n".encode("latin-1"))
    assert corpus.read_file("a.py", tmp_path).endswith("x = 'ä'\n")


def test_hashes_see_names_and_texts(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("2\n", encoding="utf-8")
    both = corpus.file_hashes(["a.py", "b.py"], tmp_path)
    assert corpus.corpus_hash(both) == corpus.corpus_hash(dict(reversed(both.items())))
    assert corpus.corpus_hash(both) != corpus.corpus_hash({"a.py": both["b.py"], "b.py": both["a.py"]})


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QjaxError, match="found none"):
        corpus.corpus_files(tmp_path)
    with pytest.raises(QjaxError, match="expected a readable Python file"):
        corpus.read_file("none.py", tmp_path)
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(QjaxError, match="expected a readable Python file"):
        corpus.read_file("bad.py", tmp_path)
