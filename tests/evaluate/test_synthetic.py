"""Made-up weights: finite, of the right types, the same in memory as from a file."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import memory
from qjax.errors import QjaxError, UnsupportedError
from qjax.evaluate import synthetic
from qjax.evaluate.shapes import SHAPES, Shape, llama, metadata, shape_of, vocabulary
from qjax.evaluate.synthetic import CODES, FLOATS, plan, save_synthetic, synthetic_blocks, synthetic_params
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.mixes import mixes
from qjax.formats.gguf.types import GGML_TYPES
from qjax.kernels import lay_out
from qjax.models import forward, load_gguf
from qjax.text import Tokenizer

TINY = Shape("tiny", llama(layers=2, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=512, context=64))


def same_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("kind", [*FLOATS, *CODES])
def test_weights_are_finite_and_of_sane_size(kind: str) -> None:
    n = 4096
    blocks = synthetic_blocks("blk.0.ffn_down.weight", kind, (64, n))
    assert blocks.shape == (64, GGML_TYPES[kind].row_bytes(n))
    w = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert w.shape == (64, n)
    assert np.isfinite(w).all()
    assert 0.4 < w.std() * np.sqrt(n) < 2.5
    assert abs(w.mean()) < w.std()


@pytest.mark.parametrize("row", [256, 16384])
@pytest.mark.parametrize("kind", [*FLOATS, *CODES])
def test_weights_are_finite_at_extreme_row_lengths(kind: str, row: int) -> None:
    w = gguf.quants.dequantize(synthetic_blocks("x.weight", kind, (3, row)), gguf.GGMLQuantizationType[kind])
    assert np.isfinite(w).all()
    assert 0 < w.std() < 1


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_norms_are_positive(kind: str) -> None:
    w = gguf.quants.dequantize(synthetic_blocks("output_norm.weight", kind, (512,)), gguf.GGMLQuantizationType[kind])
    assert w.min() >= 0.5
    assert w.max() < 1


def test_names_seed_the_bytes() -> None:
    one, again = (synthetic_blocks("blk.0.attn_q.weight", "Q4_0", (64, 256)) for _ in range(2))
    other = synthetic_blocks("blk.1.attn_q.weight", "Q4_0", (64, 256))
    np.testing.assert_array_equal(one, again)
    assert (one == other).mean() < 0.1
    # The stream must not change between versions and machines: files of different dates shall be alike.
    assert one[0, :8].tobytes().hex() == PINNED


PINNED = "3623be42961da354"


def test_bytes_do_not_repeat_within_a_tensor() -> None:
    blocks = synthetic_blocks("token_embd.weight", "Q8_0", (4096, 512))
    rows = {row.tobytes() for row in blocks}
    assert len(rows) == 4096
    counts = np.bincount(blocks.reshape(-1, 34)[:, 2:].reshape(-1), minlength=256)
    assert counts.min() > 0.9 * counts.mean()


# No weights of types that hardly any file has are made up.
@pytest.mark.parametrize("mix", [mix for mix in mixes() if mix not in ("q1_0", "q2_0")])
def test_params_from_memory_and_from_file_are_the_same(mix: str, tmp_path: Path) -> None:
    path = tmp_path / "made-up.gguf"
    size = save_synthetic(path, TINY, mix)
    assert path.stat().st_size == size
    made = synthetic_params(TINY.config, mix)
    file = open_gguf(path)
    loaded, config = load_gguf(file, lay_out=lay_out)
    kinds = {name: info.type for name, info in file.tensors.items()}
    assert config == TINY.config
    assert kinds == {name: tensor.type for name, tensor in plan(TINY.config, mix).items()}
    same_trees(made, loaded)
    packed = sum(tensor.nbytes for tensor in plan(TINY.config, mix).values())
    assert memory({k: v for k, v in made.items() if k != "rope"}).nbytes == packed


@pytest.mark.parametrize("mix", ["q4_0", "q4_k_m", "f16"])
def test_logits_are_finite(mix: str) -> None:
    params = synthetic_params(TINY.config, mix)
    logits, _ = forward(params, TINY.config, jnp.arange(32, dtype=jnp.int32)[None])
    assert np.isfinite(np.asarray(logits)).all()
    assert np.asarray(logits).std() > 0


def test_no_two_layers_share_a_buffer() -> None:
    params = synthetic_params(TINY.config, "q4_k_m")
    leaves = jax.tree.leaves(params)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_place_and_progress_are_told_each_tensor() -> None:
    placed: list[str] = []
    told: list[str] = []

    def place(name: str, array: Any) -> Any:
        placed.append(name)
        return array

    synthetic_params(TINY.config, "q8_0", place=place, progress=told.append)
    assert told == list(plan(TINY.config, "q8_0"))
    assert set(placed) == {*told, "rope"}


def test_a_file_is_made_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = synthetic.synthetic_blocks

    def spy(name: str, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
        made.append(name)
        return real(name, type_name, shape)

    monkeypatch.setattr(synthetic, "synthetic_blocks", spy)
    told: list[str] = []
    save_synthetic(tmp_path / "x.gguf", TINY, "q4_0", progress=lambda name: told.append(f"{name}/{len(made)}"))
    # Told of the n-th tensor when n of them were made: none is made ahead.
    assert told == [f"{name}/{i}" for i, name in enumerate(made)]


def test_too_large_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "available_memory", lambda: 1_000_000)
    with pytest.raises(QjaxError, match=r"type f32 need 4\.\d GB of memory, 0\.0 GB are free: choose a smaller"):
        synthetic_params(SHAPES["tinyllama-1.1b"].config, "f32")
    monkeypatch.setattr(synthetic, "available_memory", lambda: None)
    synthetic_params(dataclasses.replace(TINY.config, layers=1), "q4_0")


def test_available_memory_is_linux_reckoning() -> None:
    free = synthetic.available_memory()
    if Path("/proc/meminfo").exists():
        assert free is not None
        assert free > 1 << 20


def test_what_is_not_made_up_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match=r"x: no weights of type Q8_K are made up, only F32, "):
        synthetic_blocks("x", "Q8_K", (2, 256))
    with pytest.raises(QjaxError, match="x: expected rows of a multiple of 256 for Q4_K, got 96"):
        synthetic_blocks("x", "Q4_K", (2, 96))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tinyllama-1.1b", 1_100_048_384), ("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320)],
)
def test_shapes_have_the_parameters_of_their_models(name: str, parameters: int) -> None:
    """The counts are those of the published checkpoints."""
    planned = plan(shape_of(name.upper()).config, "f16")
    assert sum(int(np.prod(tensor.shape)) for tensor in planned.values()) == parameters


def test_unknown_shape_lists_the_known() -> None:
    with pytest.raises(
        QjaxError, match=r"shape 'gpt-9' is not known, expected one of tinyllama-1.1b, llama-7b, llama-13b"
    ):
        shape_of("gpt-9")


def test_the_vocabulary_is_a_tokenizer() -> None:
    tokens = vocabulary(32000)["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 32000
    tokenizer = Tokenizer.from_gguf(metadata(SHAPES["llama-7b"], "q4_0"))
    ids = tokenizer.encode("abc é\n")
    assert tokenizer.decode(ids).strip() == "abc é"
    with pytest.raises(QjaxError, match="at least 259 tokens, got 100"):
        vocabulary(100)


@pytest.mark.interop
@pytest.mark.parametrize(("mix", "tolerance"), [("f16", 2e-3), ("q4_0", 0.05), ("q4_k_m", 0.05), ("iq2_xs", 0.05)])
def test_llama_cpp_opens_the_file(mix: str, tolerance: float, tmp_path: Path) -> None:
    """llama.cpp reads the made-up file, and its logits are ours but for its int8 activations."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "made-up.gguf"
    save_synthetic(path, TINY, mix)
    ids = [1, 300, 301, 302, 303]
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    model.eval(ids)
    theirs = np.asarray(model.scores[: len(ids)])
    params = synthetic_params(TINY.config, mix)
    ours = np.asarray(forward(params, TINY.config, jnp.asarray([ids], jnp.int32))[0][0])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
