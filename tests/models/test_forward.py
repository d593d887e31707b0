"""Laws of the decoder: what must hold whatever the weights are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qjax.arrays import QuantizedArray, memory, partition
from qjax.formats.gguf import open_gguf
from qjax.kernels import qmatmul, rms_norm, rope_angles, swiglu
from qjax.models import ModelConfig, forward, init_cache, load_gguf
from qjax.models.forward import begin, layer
from qjax.models.load import MATRICES

TOLERANCE = 1e-5
Model = tuple[dict[str, Any], ModelConfig]


@pytest.fixture(scope="module")
def small(write_model: Callable[..., Any]) -> Model:
    """Two layers of 4-bit weights; tests use few shapes of tokens, so that little is compiled."""
    return load_gguf(open_gguf(write_model("llama", "Q4_0")))


@pytest.fixture(scope="module")
def floats(write_model: Callable[..., Any]) -> Model:
    """Such a model in float32: compiles faster, for laws that have nothing to do with packing."""
    return load_gguf(open_gguf(write_model("llama", "F32")))


def ids(*shape: int, seed: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 96, shape), jnp.int32)


def worst(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_a_token_changes_the_logits_from_its_place_on(floats: Model) -> None:
    params, config = floats
    tokens = ids(2, 6)
    changed = tokens.at[:, 3].set((tokens[:, 3] + 1) % config.vocab)
    left, right = (np.asarray(forward(params, config, t)[0]) for t in (tokens, changed))
    np.testing.assert_array_equal(left[:, :3], right[:, :3])
    for at in range(3, 6):
        assert worst(left[:, at], right[:, at]) > 1e-3


def test_only_distances_matter(write_model: Any) -> None:
    """Rotary embeddings: with one layer, a window of tokens gives the same logits wherever it stands."""
    params, config = load_gguf(open_gguf(write_model(layers=1, meta={".attention.sliding_window": 4})))
    tokens = ids(1, 6)
    shifted = jnp.concatenate([ids(1, 9, seed=6), tokens], axis=1)
    near, far = forward(params, config, tokens)[0][0, 3:], forward(params, config, shifted)[0][0, 12:]
    assert worst(near, far) < TOLERANCE


def test_a_row_does_not_see_the_others(floats: Model) -> None:
    params, config = floats
    tokens = ids(2, 6)
    other = tokens.at[1].set(ids(6, seed=9))
    left, right = (np.asarray(forward(params, config, t)[0]) for t in (tokens, other))
    np.testing.assert_array_equal(left[0], right[0])
    assert worst(left[1], right[1]) > 0.1


def test_padding_is_never_seen_and_counts_for_nothing(floats: Model) -> None:
    params, config = floats
    tokens, counts = ids(2, 6), jnp.array([4, 0], jnp.int32)
    results = []
    for junk in (0, 95):
        padded = jnp.where(jnp.arange(6)[None] < counts[:, None], tokens, junk)
        _, cache = forward(params, config, padded, init_cache(config, 2, 16, jnp.float32), counts=counts)
        logits, cache = forward(params, config, tokens, cache)
        assert cache is not None
        assert cache.length.tolist() == [10, 6]
        results.append(np.asarray(logits))
    np.testing.assert_array_equal(*results)
    # The row that had no token yet begins at position 0.
    assert worst(results[0][1], forward(params, config, tokens)[0][1]) < TOLERANCE


def test_the_number_of_slots_does_not_matter(floats: Model) -> None:
    params, config = floats
    tokens = ids(2, 6)
    plain, _ = forward(params, config, tokens)
    for slots in (6, 16):
        logits, cache = forward(params, config, tokens, init_cache(config, 2, slots, jnp.float32))
        assert cache is not None
        assert (cache.slots, cache.batch) == (slots, 2)
        assert worst(logits, plain) < TOLERANCE


def test_an_int8_cache_changes_little_and_rows_alike(floats: Model) -> None:
    params, config = floats
    tokens, counts = ids(2, 6), jnp.array([4, 6], jnp.int32)
    plain, _ = forward(params, config, tokens)
    logits, cache = forward(params, config, tokens, init_cache(config, 2, 16, jnp.int8), counts=counts)
    assert cache is not None
    assert 1e-5 < worst(logits, plain) < 0.03
    assert cache.length.tolist() == [4, 6]
    assert (cache.keys[0].codes.dtype, cache.keys[0].scale.shape) == (jnp.int8, (2, config.kv_heads, 16))
    # Token by token it holds what the whole text gave it, and padding is overwritten.
    again, _ = forward(params, config, tokens[:, 4:], cache)
    assert worst(again[0], logits[0, 4:]) < TOLERANCE
    one, _ = forward(params, config, tokens[1:], init_cache(config, 1, 16, jnp.int8))
    assert worst(one[0], logits[1]) < TOLERANCE


def test_logits_at_are_those_of_the_positions(floats: Model) -> None:
    params, config = floats
    tokens, at = ids(2, 6), jnp.array([[5, 0], [2, 2]], jnp.int32)
    every, _ = forward(params, config, tokens)
    some, _ = forward(params, config, tokens, logits_at=at)
    assert worst(some, np.take_along_axis(np.asarray(every), np.asarray(at)[:, :, None], axis=1)) < TOLERANCE


def test_packed_weights_give_the_logits_of_their_floats(small: Model) -> None:
    params, config = small

    @jax.jit
    def dequantize(params: Any) -> Any:
        packed = lambda w: isinstance(w, QuantizedArray)
        return jax.tree.map(lambda w: w.dequantize() if packed(w) else w, params, is_leaf=packed)

    tokens = ids(2, 6)
    assert worst(forward(params, config, tokens)[0], forward(dequantize(params), config, tokens)[0]) < TOLERANCE


def test_int8_activations_cost_about_a_percent(small: Model) -> None:
    plain, _ = forward(*small, ids(2, 6))
    rounded, _ = forward(*small, ids(2, 6), activations="int8")
    assert 1e-4 < worst(rounded, plain) < 0.05


def test_vmap_over_texts_equals_a_batch(small: Model) -> None:
    params, config = small
    tokens = ids(2, 6)
    batch, _ = forward(params, config, tokens)
    mapped = jax.vmap(lambda t: forward(params, config, t[None])[0][0])(tokens)
    assert worst(mapped, batch) < TOLERANCE


def test_vmap_over_models_equals_each(small: Model) -> None:
    params, config = small
    # Rows of every matrix in reverse: another model.
    other = jax.tree.map(lambda leaf: leaf[::-1] if leaf.ndim == 2 else leaf, params)
    tokens = ids(2, 6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    both = jax.vmap(lambda p: forward(p, config, tokens)[0])(stacked)
    assert worst(both[0], both[1]) > 0.1
    for got, p in zip(both, (params, other), strict=True):
        assert worst(got, forward(p, config, tokens)[0]) < TOLERANCE


def test_scan_over_tokens_equals_one_call(small: Model) -> None:
    params, config = small
    tokens = ids(2, 6)

    @jax.jit
    def decode(cache: Any, tokens: Any) -> Any:
        def step(cache: Any, token: Any) -> Any:
            logits, cache = forward(params, config, token[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, tokens.T)

    cache, logits = decode(init_cache(config, 2, 16, jnp.float32), tokens)
    assert cache.length.tolist() == [6, 6]
    assert worst(logits.swapaxes(0, 1), forward(params, config, tokens)[0]) < TOLERANCE


# Megatron's way: what makes heads and hidden units is cut by outputs, what sums over them by inputs.
SIDES: dict[str, Any] = {"attn_output.weight": "in", "ffn_down.weight": "in"} | dict.fromkeys(
    [
        "attn_q.weight",
        "attn_k.weight",
        "attn_v.weight",
        "ffn_gate.weight",
        "ffn_up.weight",
        "output.weight",
        "token_embd.weight",
    ],
    "out",
)


def test_weights_cut_over_devices_give_the_same_logits(write_model: Any) -> None:
    file = open_gguf(write_model("llama", "Q4_0", layers=1))
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    cut: list[str] = []

    def place(name: str, array: Any) -> Any:
        side = SIDES.get(name.removeprefix("blk.0."))
        if side is None:
            return array
        cut.append(name)
        return partition(array, mesh, "model", side)

    tokens = ids(2, 6)
    whole, config = load_gguf(file)
    parts, _ = load_gguf(file, place=place)
    assert len(cut) == len(SIDES)
    want, _ = forward(whole, config, tokens)
    assert worst(forward(parts, config, tokens)[0], want) < TOLERANCE
    cache = init_cache(config, 2, 8, jnp.float32)
    for step in range(3):
        logits, cache = forward(parts, config, tokens[:, 2 * step : 2 * step + 2], cache)
        assert worst(logits, want[:, 2 * step : 2 * step + 2]) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 32])
def test_a_layer_never_holds_a_float_copy_of_a_weight(write_model: Any, rows: int) -> None:
    params, config = load_gguf(open_gguf(write_model("llama", "Q4_0", layers=1, ffn=16384)))
    p = params["layers"][0]
    x = jnp.zeros((1, rows, config.hidden), jnp.float32)
    positions = jnp.zeros((1, rows), jnp.int32)
    used = (
        layer.lower(p, x, rope_angles(positions, params["rope"]), positions, None, config=config)
        .compile()
        .memory_analysis()
    )
    copy, activations = 4 * memory(p["ffn_up"]).parameters, 4 * rows * config.ffn
    assert used.temp_size_in_bytes < copy / 2 + 4 * activations


def test_a_tap_sees_what_the_weights_are_multiplied_with(small: Model) -> None:
    """Their products with it, added up, are the layer; the layer is the same without it."""
    params, config = small
    p = params["layers"][1]
    x, angles, positions = begin(params, ids(2, 6), jnp.zeros(2, jnp.int32))
    keep: Any = lambda names, seen: seen
    plain, _, nothing = layer(p, x, angles, positions, None, config=config)
    y, _, tapped = layer(p, x, angles, positions, None, config=config, tap=keep)
    assert nothing == {}
    np.testing.assert_array_equal(y, plain)
    assert sorted(name for names in tapped for name in names) == sorted(MATRICES)
    inputs = {name: seen for names, seen in tapped.items() for name in names}
    product = lambda name: qmatmul(inputs[name], p[name])
    attended = x + product("attn_output")
    assert worst(y, attended + product("ffn_down")) < TOLERANCE
    assert worst(inputs["attn_q"], rms_norm(x, p["attn_norm"], config.norm_eps)) < TOLERANCE
    assert worst(inputs["ffn_up"], rms_norm(attended, p["ffn_norm"], config.norm_eps)) < TOLERANCE
    assert worst(inputs["ffn_down"], swiglu(product("ffn_gate"), product("ffn_up"))) < TOLERANCE


def test_a_tap_keeps_what_it_likes(floats: Model) -> None:
    """Any tree of each input, or nothing."""
    params, config = floats
    x, angles, positions = begin(params, ids(2, 6), jnp.zeros(2, jnp.int32))

    def hessian(names: tuple[str, ...], seen: Any) -> Any:
        flat = seen.reshape(-1, seen.shape[-1])
        return {"hessian": flat.T @ flat, "rows": jnp.int32(flat.shape[0])} if names == ("ffn_down",) else None

    _, _, tapped = layer(params["layers"][0], x, angles, positions, None, config=config, tap=hessian)
    kept = {names: seen for names, seen in tapped.items() if seen is not None}
    assert kept.keys() == {("ffn_down",)}
    assert kept["ffn_down",]["hessian"].shape == (config.ffn, config.ffn)
    assert kept["ffn_down",]["rows"] == 12
