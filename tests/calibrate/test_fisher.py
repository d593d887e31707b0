"""Fisher information against gradients of the whole model, and against divergences that were measured."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.fisher import Fisher, accumulate, divergence_of, drawn_rows, each, fisher
from qjax.calibrate.own_text import own_text
from qjax.errors import QjaxError
from qjax.formats.gguf.imatrix import read_imatrix, write_imatrix
from qjax.models import forward
from qjax.models.load import MATRICES


@pytest.fixture(scope="module")
def model() -> qjax.Model:
    return qjax.load("embedded", quantize=lambda name, w: w.astype(np.float32))


@pytest.fixture(scope="module")
def chunks(model: qjax.Model) -> np.ndarray:
    return own_text(model.params, model.config, chunks=6, n_ctx=48, bos_id=1, seed=3)


def changed(params: dict[str, Any], name: str, w: Any) -> dict[str, Any]:
    """The params with another matrix in a place."""
    if not name.startswith("blk."):
        return params | {name.removesuffix(".weight"): w}
    _, layer, role, _ = name.split(".")
    layers = list(params["layers"])
    layers[int(layer)] = layers[int(layer)] | {role: w}
    return params | {"layers": layers}


def matrix(params: dict[str, Any], name: str) -> Any:
    if not name.startswith("blk."):
        return params[name.removesuffix(".weight")]
    _, layer, role, _ = name.split(".")
    return params["layers"][int(layer)][role]


def test_sums_are_those_of_the_whole_models_gradients(model: qjax.Model, chunks: np.ndarray) -> None:
    """The tokens drawn are the same; the two ends of a tied embedding are set apart by a copy."""
    config = model.config
    params = model.params | {"output": model.params.get("output", model.params["token_embd"])}
    names = [
        "output.weight",
        "token_embd.weight",
        *(f"blk.{i}.{m}.weight" for i in (0, config.layers - 1) for m in MATRICES),
    ]
    found = each(fisher(params, config, chunks[:1], seed=7))
    tokens = jnp.asarray(chunks[:1])

    def log_likelihood(weights: dict[str, Any]) -> Any:
        mine = params
        for name, w in weights.items():
            mine = changed(mine, name, w)
        likely = jax.nn.log_softmax(forward(mine, config, tokens)[0][0])
        drawn = jax.random.categorical(jax.random.key(7), jax.lax.stop_gradient(likely))
        return jnp.take_along_axis(likely, drawn[:, None], axis=1).sum()

    gradients = jax.grad(log_likelihood)({name: matrix(params, name) for name in names})
    for name, gradient in gradients.items():
        square = np.square(np.asarray(gradient, np.float64)) / chunks.shape[1]
        np.testing.assert_allclose(found[name].rows, square.sum(1), rtol=2e-3, atol=1e-6 * square.sum(), err_msg=name)
        np.testing.assert_allclose(
            found[name].columns, square.sum(0), rtol=2e-3, atol=1e-6 * square.sum(), err_msg=name
        )


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ffn_down.weight", "blk.2.attn_v.weight"])
def test_a_small_errors_divergence_is_foretold(model: qjax.Model, chunks: np.ndarray, name: str) -> None:
    found = each(fisher(model.params, model.config, chunks))[name]
    w = matrix(model.params, name)
    rng = np.random.default_rng(0)
    error = (0.02 * float(jnp.std(w)) * rng.standard_normal(w.shape)).astype(np.float32)
    before, after = (
        jax.nn.log_softmax(forward(p, model.config, jnp.asarray(chunks))[0])
        for p in (model.params, changed(model.params, name, w + error))
    )
    measured = float((jnp.exp(before) * (before - after)).sum(-1).mean())
    assert divergence_of(found, error) == pytest.approx(measured, rel=0.35)


def test_rows_drawn_tell_what_all_rows_do() -> None:
    rng = np.random.default_rng(1)
    of = Fisher(rng.lognormal(0, 2, 4000), rng.lognormal(0, 1, 64))
    of = Fisher(of.rows / of.rows.sum() * of.columns.sum(), of.columns)
    error = (rng.standard_normal((4000, 64)) * rng.uniform(0.5, 2, (4000, 1))).astype(np.float32)
    rows = drawn_rows(of, 500)
    assert divergence_of(of, error[rows], rows) == pytest.approx(divergence_of(of, error), rel=0.1)


def test_a_packed_model_too(model: qjax.Model, chunks: np.ndarray) -> None:
    packed = qjax.load("embedded", quantize="q8_0")
    ours, theirs = (each(fisher(m.params, m.config, chunks[:2])) for m in (packed, model))
    for name in ours:
        assert ours[name].rows.sum() == pytest.approx(theirs[name].rows.sum(), rel=0.3)


def test_a_file_of_it(model: qjax.Model, chunks: np.ndarray, tmp_path: Path) -> None:
    """It is an importance matrix with the rows beside it; a run goes on from it to the last bit."""
    whole = fisher(model.params, model.config, chunks[:2])
    half = fisher(model.params, model.config, chunks[:1])
    write_imatrix(tmp_path / "f.gguf", half, exact=True)
    *_, again = accumulate(model.params, model.config, chunks[:2], read_imatrix(tmp_path / "f.gguf"))
    for name in whole.sums:
        np.testing.assert_array_equal(again.sums[name], whole.sums[name])
        np.testing.assert_array_equal(again.row_sums[name], whole.row_sums[name])
    write_imatrix(tmp_path / "f.gguf", whole)
    for name, of in each(read_imatrix(tmp_path / "f.gguf")).items():
        np.testing.assert_allclose(of.rows, each(whole)[name].rows, rtol=1e-6)
    assert not each(whole._replace(row_sums={}))


def test_no_text(model: qjax.Model) -> None:
    with pytest.raises(QjaxError, match="at least one chunk"):
        fisher(model.params, model.config, np.zeros((0, 8), np.int32))


def test_own_text_is_drawn_from_the_model(model: qjax.Model) -> None:
    one, same, other = (own_text(model.params, model.config, chunks=2, n_ctx=16, bos_id=1, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one[:, 0] == 1).all()
    assert ((one >= 0) & (one < model.config.vocab)).all()
    unlike = np.random.default_rng(0).integers(0, model.config.vocab, (2, 16)).astype(np.int32)
    likely, unlikely = (
        float(
            jnp.take_along_axis(
                jax.nn.log_softmax(forward(model.params, model.config, jnp.asarray(t))[0])[:, :-1],
                jnp.asarray(t)[:, 1:, None],
                axis=-1,
            ).mean()
        )
        for t in (one, unlike)
    )
    assert likely > unlikely + 1
