"""KL divergence against a base file: the file's form, the numbers in float64, and what is refused."""

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, QjaxError
from qjax.evaluate import divergence as module
from qjax.evaluate import perplexity
from qjax.evaluate.divergence import Scores, base_nbytes, divergence, read_base, save_base, statistics
from qjax.models import forward
from qjax.models.chunks import chunks_of

CTX = 64


@pytest.fixture(scope="module")
def model() -> Any:
    return qjax.load("embedded")


@pytest.fixture(scope="module")
def ids(model: Any) -> list[int]:
    return model.encode(Path(jax.__file__).read_text()[:3000])


@pytest.fixture(scope="module")
def base(model: Any, ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "f16.kld"
    cut = chunks_of(model.config, ids, n_ctx=CTX, bos_id=model.tokenizer.bos_id, chunks=3)
    saved = save_base(path, model.params, model.config, cut, bos_id=model.tokenizer.bos_id)
    plain = perplexity(model.params, model.config, ids, n_ctx=CTX, bos_id=model.tokenizer.bos_id, chunks=3)
    assert np.exp(saved.mean()) == pytest.approx(plain.perplexity, rel=1e-12)
    return path


def test_of_itself(model: Any, base: Path) -> None:
    found = divergence(model.params, model.config, read_base(base, model.config), bos_id=model.tokenizer.bos_id)
    assert found.same_top > 0.98
    assert abs(found.mean_kld) < 1e-5
    assert found.perplexity.perplexity == pytest.approx(found.base_perplexity, rel=1e-4)


def test_against_float64(model: Any, ids: list[int], base: Path) -> None:
    """The divergence of a 4-bit copy, from both models' logits."""
    copy = qjax.load("embedded", quantize="q4_0")
    found = divergence(copy.params, copy.config, read_base(base, copy.config), bos_id=model.tokenizer.bos_id)
    kld, same = [], []
    for chunk in np.asarray(ids[: 3 * CTX], np.int32).reshape(3, CTX):
        shown = chunk.copy()
        shown[0] = model.tokenizer.bos_id
        logp = []
        for m in (model, copy):
            logits = np.asarray(forward(m.params, m.config, jnp.asarray(shown)[None])[0][0, CTX // 2 : -1], np.float64)
            logp.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        p = np.exp(logp[0])
        kld.append((p * (logp[0] - logp[1])).sum(-1))
        same.append(logp[0].argmax(-1) == logp[1].argmax(-1))
    values = np.concatenate(kld)
    assert found.mean_kld == pytest.approx(values.mean(), rel=5e-3)
    assert found.max_kld == pytest.approx(values.max(), rel=1e-2)
    assert found.median_kld == pytest.approx(np.median(values), rel=1e-2)
    assert found.same_top == pytest.approx(np.mean(same), abs=0.02)
    assert found.percentiles["99"] <= found.max_kld


def test_the_file_s_form(model: Any, base: Path) -> None:
    data = base.read_bytes()
    assert struct.unpack_from("<8sIii", data) == (b"_logits_", CTX, model.config.vocab, 3)
    assert len(data) == base_nbytes(3, CTX, model.config.vocab)
    read = read_base(base, model.config)
    head = np.ascontiguousarray(read.rows[0, 0, :4]).view(np.float32)
    logp = head[0] * read.rows[0, 0, 4:].astype(np.float32) + head[1]
    assert np.exp(logp).sum() == pytest.approx(1, abs=2e-3)


def test_statistics_are_those_of_a_sample() -> None:
    """Against numpy's and the delta method's, in the form that llama-perplexity computes them: from (co)variances."""
    rng = np.random.default_rng(0)
    base_loss = rng.exponential(2, (7, 31))
    loss = base_loss + rng.normal(0.02, 0.1, base_loss.shape)
    kld, same = rng.exponential(0.01, loss.shape), rng.random(loss.shape) < 0.9
    found = statistics(Scores(loss, base_loss, kld, same), 1.5)
    covariance = np.cov(loss.ravel(), base_loss.ravel()) / loss.size
    ratio = np.exp(loss.mean()) / np.exp(base_loss.mean())
    assert found.perplexity_ratio == pytest.approx(ratio)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.ratio_stderr == pytest.approx(ratio * error)
    assert found.kld_stderr == pytest.approx(kld.std(ddof=1) / np.sqrt(kld.size))
    assert found.perplexity[2:] == (loss.size, 7, 1.5)
    assert found.rms_dp == pytest.approx(np.sqrt(((np.exp(-loss) - np.exp(-base_loss)) ** 2).mean()))
    assert found.same_top == same.mean()


def test_progress_tells_the_divergence_so_far(model: Any, base: Path) -> None:
    told: list[tuple[int, int, float]] = []
    copy = qjax.load("embedded", quantize="q4_0")
    options: dict[str, Any] = {"bos_id": model.tokenizer.bos_id}
    read = read_base(base, model.config)
    found = divergence(copy.params, copy.config, read, progress=lambda *args: told.append(args), **options)
    assert [entry[:2] for entry in told] == [(1, 3), (2, 3), (3, 3)]
    one = divergence(copy.params, copy.config, read, chunks=1, **options)
    assert [told[0][2], told[2][2]] == pytest.approx([one.mean_kld, found.mean_kld])


def test_a_full_disk_is_seen_before_the_work(
    model: Any, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = base_nbytes(3, CTX, model.config.vocab) - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    cut = chunks_of(model.config, ids, n_ctx=CTX, bos_id=None, chunks=3)
    with pytest.raises(QjaxError, match=r"x\.kld: .* GB free: take fewer chunks"):
        save_base(tmp_path / "x.kld", model.params, model.config, cut, bos_id=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"_logitz_" + data[8:], "no log-probabilities"),
        (lambda data: data[:15], "no log-probabilities"),
        (lambda data: data[:-2], "cut short"),
        (lambda data: data[:12] + struct.pack("<i", 7) + data[16:], "vocabulary of 7"),
        (lambda data: data[:8] + struct.pack("<I", 1 << 31) + data[12:], "tokens"),
        (lambda data: data[:16] + struct.pack("<i", 1 << 30) + data[20:], "cut short"),
        (lambda data: data[:20] + struct.pack("<i", -5) + data[24:], "token id"),
    ],
)
def test_refuses(model: Any, base: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "bad.kld"
    path.write_bytes(change(base.read_bytes()))
    with pytest.raises(FormatError, match=words) as error:
        read_base(path, model.config)
    assert "bad.kld" in str(error.value)
