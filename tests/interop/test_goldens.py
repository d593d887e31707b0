"""Logits equal transformers' for every architecture and variant, however the text is cut into chunks and batches.

The stored goldens were made by `make_goldens.py`; `make interop` makes others from another seed, where torch and
transformers are installed.
"""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats.gguf import open_gguf
from qjax.kernels import rope_angles
from qjax.models import KVCache, ModelConfig, forward, init_cache, load_gguf
from qjax.models.forward import layer

FOLDER = Path(__file__).parent / "goldens"
NAMES = ["llama", "llama-3", "llama-head-dim", "llama-linear", "llama-tied", "mistral", "qwen2", "qwen3"]
# Of the largest logit. Two float32 programs that sum in another order differ by 1e-6 to 3e-6 here.
TOLERANCE = 1e-5


class Golden(NamedTuple):
    params: dict[str, Any]
    config: ModelConfig
    tokens: np.ndarray
    logits: np.ndarray


def read(folder: Path, name: str) -> Golden:
    params, config = load_gguf(open_gguf(folder / f"{name}.gguf"))
    with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
        return Golden(params, config, stored["tokens"], stored["logits"])


@functools.cache
def golden(name: str) -> Golden:
    return read(FOLDER, name)


def worst(got: Any, want: np.ndarray) -> float:
    """Largest difference, relative to the largest logit."""
    got = np.asarray(got)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    return float(np.abs(got - want).max() / np.abs(want).max())


def row(tokens: np.ndarray) -> jax.Array:
    return jnp.asarray(tokens, jnp.int32)[None]


def in_chunks(g: Golden, cache: KVCache) -> np.ndarray:
    """Logits of the whole text: a padded chunk of 17, a full one of 20, then token by token."""
    parts = []
    padded = np.concatenate([g.tokens[:17], np.full(3, 5, np.int32)])
    logits, cache = forward(g.params, g.config, row(padded), cache, counts=jnp.array([17], jnp.int32))
    parts.append(logits[0, :17])
    logits, cache = forward(g.params, g.config, row(g.tokens[17:37]), cache)
    parts.append(logits[0])
    for token in g.tokens[37:]:
        logits, cache = forward(g.params, g.config, row(token[None]), cache)
        parts.append(logits[0])
    assert cache.length.tolist() == [len(g.tokens)]
    return np.concatenate([np.asarray(part) for part in parts])


def test_no_golden_is_left_out() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.gguf")) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.npz")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name: str) -> None:
    g = golden(name)
    logits, cache = forward(g.params, g.config, row(g.tokens))
    assert cache is None
    assert worst(logits[0], g.logits) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_chunks_through_a_cache_equal_transformers(name: str) -> None:
    g = golden(name)
    assert worst(in_chunks(g, init_cache(g.config, 1, 64, jnp.float32)), g.logits) < TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 2e-3), (jnp.bfloat16, 1.5e-2)])
def test_a_half_cache_costs_its_rounding_only(dtype: Any, tolerance: float) -> None:
    g = golden("qwen3")
    cache = init_cache(g.config, 1, 64, dtype)
    assert cache.nbytes == 2 * 2 * g.config.layers * g.config.kv_heads * 64 * g.config.head_dim
    assert TOLERANCE < worst(in_chunks(g, cache), g.logits) < tolerance


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_batch_of_unequal_prompts_equals_each_alone(name: str) -> None:
    g = golden(name)
    rng = np.random.default_rng(7)
    # Beginnings of the golden text, so that transformers answers for them; then each goes on from where it stands.
    lengths = np.array([20, 3, 11, 17])
    padded = rng.integers(0, g.config.vocab, (4, 20)).astype(np.int32)
    for prompt, length in zip(padded, lengths, strict=True):
        prompt[:length] = g.tokens[:length]
    cache = init_cache(g.config, 4, 48, jnp.float32)
    logits, cache = forward(g.params, g.config, jnp.asarray(padded), cache, counts=jnp.asarray(lengths, jnp.int32))
    for got, length in zip(logits, lengths, strict=True):
        assert worst(got[:length], g.logits[:length]) < TOLERANCE
    for step in range(12):
        at = lengths + step
        logits, cache = forward(g.params, g.config, jnp.asarray(g.tokens[at][:, None], jnp.int32), cache)
        assert worst(logits[:, 0], g.logits[at]) < TOLERANCE
    assert cache is not None
    assert cache.length.tolist() == (lengths + 12).tolist()


def test_one_outer_jit_equals_the_plain_call() -> None:
    g = golden("mistral")
    run = jax.jit(forward, static_argnames=("config", "activations"), donate_argnames=("cache",))
    logits, _ = run(g.params, g.config, row(g.tokens))
    assert worst(logits[0], g.logits) < TOLERANCE
    first, cache = run(g.params, g.config, row(g.tokens[:30]), init_cache(g.config, 1, 64, jnp.float32))
    assert worst(first[0], g.logits[:30]) < TOLERANCE
    held = cache.keys[0].unsafe_buffer_pointer()
    second, after = run(g.params, g.config, row(g.tokens[30:]), cache)
    assert worst(second[0], g.logits[30:]) < TOLERANCE
    assert cache.keys[0].is_deleted()
    assert after.keys[0].unsafe_buffer_pointer() == held


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_updated_in_place(batch: int) -> None:
    g = golden("llama-3")
    tokens = jnp.asarray(np.tile(g.tokens[:5], (batch, 1)))
    cache = init_cache(g.config, batch, 64, jnp.float16)
    before = [array.unsafe_buffer_pointer() for array in (*cache.keys, *cache.values)]
    _, after = forward(g.params, g.config, tokens, cache)
    assert all(array.is_deleted() for array in (*cache.keys, *cache.values))
    assert after is not None
    assert [array.unsafe_buffer_pointer() for array in (*after.keys, *after.values)] == before
    lowered = layer.lower(
        g.params["layers"][0],
        jnp.zeros((batch, 5, g.config.hidden), jnp.float32),
        rope_angles(jnp.zeros((batch, 5), jnp.int32), g.params["rope"]),
        jnp.zeros((batch, 5), jnp.int32),
        (after.keys[0], after.values[0]),
        config=g.config,
    )
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= after.keys[0].nbytes + after.values[0].nbytes


def test_the_window_is_what_the_file_says() -> None:
    g = golden("mistral")
    assert g.config.window == 12
    full, _ = forward(g.params, dataclasses.replace(g.config, window=None), row(g.tokens))
    wide, _ = forward(g.params, dataclasses.replace(g.config, window=len(g.tokens)), row(g.tokens))
    narrow, _ = forward(g.params, dataclasses.replace(g.config, window=11), row(g.tokens))
    assert worst(full[0, :12], g.logits[:12]) < TOLERANCE
    assert worst(full[0, 12:], g.logits[12:]) > 0.1
    assert worst(narrow[0, 11:], g.logits[11:]) > 0.1
    assert worst(wide, np.asarray(full)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "tensor", "fill"),
    [
        ("qwen2", "attn_q_bias", 0),
        ("qwen2", "attn_k_bias", 0),
        ("qwen2", "attn_v_bias", 0),
        ("qwen3", "attn_q_norm", 1),
        ("qwen3", "attn_k_norm", 1),
        ("llama-head-dim", "attn_output_bias", 0),
        ("llama-head-dim", "ffn_gate_bias", 0),
        ("llama-head-dim", "ffn_up_bias", 0),
        ("llama-head-dim", "ffn_down_bias", 0),
    ],
)
def test_goldens_notice_each_small_tensor(name: str, tensor: str, fill: int) -> None:
    g = golden(name)
    layers = [p | {tensor: jnp.full_like(p[tensor], fill)} for p in g.params["layers"]]
    assert worst(forward(g.params | {"layers": layers}, g.config, row(g.tokens))[0][0], g.logits) > 1e-2


@pytest.mark.parametrize("name", ["llama-3", "llama-linear"])
def test_goldens_notice_the_rope_scaling(name: str) -> None:
    g = golden(name)
    half = np.arange(0, g.config.rope_dim, 2, dtype=np.float32) / g.config.rope_dim
    plain = jnp.asarray(np.float32(g.config.rope_theta) ** -half)
    assert not np.allclose(plain, g.params["rope"])
    assert worst(forward(g.params | {"rope": plain}, g.config, row(g.tokens))[0][0], g.logits) > 1e-2


def test_tied_embeddings_share_one_array() -> None:
    assert "output" not in golden("llama-tied").params


@pytest.mark.interop
def test_new_goldens_equal_transformers_live(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        pytest.skip("torch and transformers are not installed (pip install -e '.[interop]')")
    script = Path(__file__).parent / "make_goldens.py"
    subprocess.run([sys.executable, script, "--out", tmp_path, "--seed", "2"], check=True, timeout=600)
    for name in NAMES:
        g = read(tmp_path, name)
        assert worst(forward(g.params, g.config, row(g.tokens))[0][0], g.logits) < TOLERANCE
