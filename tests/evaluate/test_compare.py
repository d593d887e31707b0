"""Several models on one text: rows, front and pairs are what the single measurements give, one model at a time."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, QjaxError
from qjax.evaluate.compare import Candidate, Comparison, Row, compare, pareto_front
from qjax.evaluate.divergence import Scores, divergence, read_base, save_base, statistics
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.models.chunks import chunks_of

CTX, CHUNKS = 64, 4
TEXT = Path(jax.__file__).read_text(encoding="utf-8")[:3000]


Quantized = Callable[[str], Candidate]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A small made-up model at a type."""
    config = llama(layers=1, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=128)
    path = tmp_path_factory.mktemp("model") / "f16.gguf"
    save_synthetic(path, Shape("tiny", config), "f16")
    return lambda kind: Candidate(kind, lambda: qjax.load(path, quantize=None if kind == "f16" else kind))


@pytest.fixture(scope="module")
def base_file(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized("f16").open()
    bos = model.tokenizer.bos_id
    path = tmp_path_factory.mktemp("base") / "f16.kld"
    cut = chunks_of(model.config, model.encode(TEXT), n_ctx=CTX, bos_id=bos, chunks=CHUNKS)
    save_base(path, model.params, model.config, cut, bos_id=bos)
    return path


@pytest.fixture(scope="module")
def found(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("predictions")
    base = quantized("f16")
    models = [base, *map(quantized, ["q4_0", "q8_0", "q4_1"])]
    result = compare(models, TEXT, base=base, n_ctx=CTX, chunks=CHUNKS, resamples=300, folder=folder)
    assert not list(folder.iterdir())
    return result


def test_rows_are_the_single_measurements(found: Comparison, base_file: Path, quantized: Quantized) -> None:
    assert [row.name for row in found.rows] == ["q4_0", "q4_1", "q8_0", "f16"]
    for row in found.rows[:3]:
        model = quantized(row.name).open()
        one = divergence(model.params, model.config, read_base(base_file, model.config), bos_id=model.tokenizer.bos_id)
        assert row.nbytes == model.memory.nbytes
        assert row.bits_per_weight == model.memory.bits_per_weight
        assert row.found.perplexity[:4] == one.perplexity[:4]
        assert (row.found[4:9], row.found.same_top) == (one[4:9], one.same_top)
        # The file bounds what the base finds unlikely; its run in this process does not.
        ratio = row.found.perplexity.perplexity / row.found.base_perplexity
        assert row.found.perplexity_ratio == pytest.approx(ratio, rel=1e-12)
        assert row.found.base_perplexity == found.rows[3].found.perplexity.perplexity
        assert row.chunk_kld.mean() == pytest.approx(one.mean_kld)
        assert not row.is_base


def test_the_base_is_at_no_distance_from_itself(found: Comparison, quantized: Quantized) -> None:
    row = found.rows[-1]
    model = quantized("f16").open()
    bos = model.tokenizer.bos_id
    plain = qjax.perplexity(model.params, model.config, model.encode(TEXT), n_ctx=CTX, chunks=CHUNKS, bos_id=bos)
    assert row.is_base
    assert row.found.perplexity[:4] == plain[:4]
    assert (row.found.mean_kld, row.found.same_top, row.found.perplexity_ratio) == (0.0, 1.0, 1.0)
    assert "f16" not in found.front


def test_neighbours_are_paired(found: Comparison) -> None:
    assert [(pair.a, pair.b) for pair in found.pairs] == [("q4_0", "q4_1"), ("q4_1", "q8_0")]
    of = {row.name: row for row in found.rows}
    for pair in found.pairs:
        assert pair.difference == pytest.approx(of[pair.a].found.mean_kld - of[pair.b].found.mean_kld)
        assert pair.low <= pair.difference <= pair.high
    assert found.pairs[1].low > 0
    assert found.pairs[1].a_better == 0


def test_from_a_base_file_against_one(found: Comparison, base_file: Path, quantized: Quantized) -> None:
    models = [quantized("q8_0"), quantized("q4_0"), Candidate("file", quantized("q4_1").open, 77)]
    other = compare(models, TEXT, base=base_file, chunks=CHUNKS, against="q8_0", resamples=300)
    assert [row.name for row in other.rows] == ["file", "q4_0", "q8_0"]
    assert other.rows[0].nbytes == 77
    assert other.rows[1].found.mean_kld == found.rows[0].found.mean_kld
    assert [(pair.a, pair.b) for pair in other.pairs] == [("file", "q8_0"), ("q4_0", "q8_0")]
    assert not any(row.is_base for row in other.rows)


def test_one_model_at_a_time_and_each_once(quantized: Quantized) -> None:
    alive: list[Any] = []
    opened: list[str] = []
    told: list[tuple[str, int, int]] = []

    def opening(name: str) -> Candidate:
        def open_model() -> Any:
            gc.collect()
            assert not [ref for ref in alive if ref() is not None], "the model before is still there"
            model = quantized(name).open()
            alive.append(weakref.ref(model))
            opened.append(name)
            return model

        return Candidate(name, open_model)

    models = [opening(name) for name in ("q8_0", "f16", "q4_0")]
    compare(
        models, TEXT, base=models[1], n_ctx=CTX, chunks=2, progress=lambda name, *done: told.append((name, *done[:2]))
    )
    assert opened == ["f16", "q8_0", "q4_0"]
    assert told == [(name, i, 2) for name in opened for i in (1, 2)]


def test_one_chunk_has_no_pairs(base_file: Path, quantized: Quantized) -> None:
    result = compare([quantized("q8_0"), quantized("q4_0")], TEXT, base=base_file, chunks=1)
    assert len(result.rows) == 2
    assert result.pairs == []


def row(name: str, nbytes: int, kld: float) -> Row:
    shape = (2, 5)
    scores = Scores(np.ones(shape), np.ones(shape), np.full(shape, kld), np.ones(shape, np.bool_))
    return Row(name, nbytes, 4.0, statistics(scores, 1.0), np.full(2, kld), False)


def test_the_front() -> None:
    rows = [row("a", 10, 0.5), row("b", 20, 0.6), row("c", 30, 0.2), row("d", 30, 0.3), row("e", 40, 0.2)]
    assert pareto_front(rows) == ["a", "c"]
    assert pareto_front([]) == []


def test_refuses(base_file: Path, quantized: Quantized, tmp_path: Path) -> None:
    q8, q4 = quantized("q8_0"), quantized("q4_0")
    for models in ([], [q8, q8]):
        with pytest.raises(QjaxError, match="models of different names"):
            compare(models, TEXT, base=base_file)
    with pytest.raises(QjaxError, match=r"q9 is not among the models .*: q8_0, q4_0"):
        compare([q8, q4], TEXT, base=base_file, against="q9")
    with pytest.raises(QjaxError, match="has chunks of 64 tokens, not 32"):
        compare([q8], TEXT, base=base_file, n_ctx=32)
    with pytest.raises(QjaxError, match=r"q8_0 cannot be compared: .*another text"):
        compare([q8], TEXT[5:], base=base_file)
    config = llama(layers=1, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=384, context=128)
    save_synthetic(tmp_path / "other.gguf", Shape("tiny", config), "q8_0")
    other = Candidate("other", lambda: qjax.load(tmp_path / "other.gguf"))
    with pytest.raises(FormatError, match=r"other cannot be compared: .* the model's has 384"):
        compare([other], TEXT, base=base_file)
    with pytest.raises(QjaxError, match=r"the text has .* tokens, fewer than one chunk"):
        compare([q8], "short", base=quantized("f16"), n_ctx=CTX)
    assert not list(Path(tmp_path).glob(".qjax-*"))
