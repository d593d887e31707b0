"""Scales folded into a block leave what it computes as it was; methods that use them are deterministic."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import QuantizedArray, Scheme, TransformedArray
from qjax.calibrate.blocks import Block
from qjax.calibrate.methods.awq import AWQ
from qjax.calibrate.methods.pairs import PAIRS, Pair, fold, ties
from qjax.calibrate.methods.scaling import block_sums
from qjax.calibrate.methods.smoothquant import SmoothQuant
from qjax.errors import QjaxError
from qjax.models import ModelConfig
from qjax.models.load import MATRICES, expected_shapes, inverse_frequencies
from qjax.quantizers.rtn import rtn

METHODS = [AWQ(n_grid=4, clip=False, fold=False), SmoothQuant(), SmoothQuant(alpha=None)]


def block(
    arch: str = "qwen3",
    kv_heads: int = 2,
    dtype: Any = jnp.float32,
    scheme: Scheme | None = None,
    samples: int = 8,
    seed: int = 0,
) -> Block:
    """Grouped-query attention, normed queries and keys, biases everywhere, and a few large columns of activations."""
    config = ModelConfig(arch, 1, 64, 4, kv_heads, 16, 64, 32, 64, 1e-5, 1e4, 16)
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for name, shape in expected_shapes(config).items():
        if not name.startswith("blk.0."):
            continue
        key = name.removeprefix("blk.0.").removesuffix(".weight").replace(".bias", "_bias")
        if len(shape) == 2:
            weights[key] = jnp.asarray(rng.normal(size=shape) / 8, dtype)
        else:
            weights[key] = jnp.asarray(rng.normal(size=shape) / 8 + (0 if "bias" in key else 1), jnp.float32)
    for norm in ("attn_norm", "ffn_norm"):
        weights[norm] = weights[norm].at[np.array([3, 40])].mul(20)
    inputs = rng.normal(size=(samples, 12, 64)).astype(np.float32)
    schemes = {} if scheme is None else dict.fromkeys(MATRICES, scheme)
    return Block(0, weights, schemes, config, jnp.asarray(inverse_frequencies(config, None)), inputs, batch=4)


def scale_for(pair: Pair, b: Block, seed: int = 0) -> Any:
    size = b.weights[pair.names[0]].shape[1]
    scale = np.random.default_rng(seed).lognormal(0, 1, size).astype(np.float32)
    tied = ties(pair, b.config)
    return jnp.asarray(scale if tied is None else scale[tied])


@pytest.mark.parametrize(("arch", "kv_heads"), [("llama", 4), ("qwen2", 1), ("qwen3", 2)])
def test_folding_changes_no_output(arch: str, kv_heads: int) -> None:
    b = block(arch, kv_heads)
    true, weights = b.outputs(b.weights, b.inputs), b.weights
    for i, pair in enumerate(PAIRS):
        folded = fold(weights, pair, scale_for(pair, b, i), b.config)
        assert any((np.asarray(folded[k]) != np.asarray(weights[k])).any() for k in pair.names)
        weights = folded
        np.testing.assert_allclose(b.outputs(weights, b.inputs), true, rtol=1e-3, atol=1e-4)


def test_folding_into_a_16_bit_norm_is_as_exact() -> None:
    b = block()
    pair = PAIRS[0]
    halved = b.weights | {"attn_norm": b.weights["attn_norm"].astype(jnp.float16)}
    folded = fold(halved, pair, scale_for(pair, b), b.config)
    assert folded["attn_norm"].dtype == jnp.float16
    np.testing.assert_allclose(b.outputs(folded, b.inputs), b.outputs(halved, b.inputs), rtol=1e-3, atol=1e-4)


def test_packed_neighbours_are_given_their_scale() -> None:
    b = block()
    packed = b.weights | {"attn_k": rtn(b.weights["attn_k"], Scheme(8, -1))}
    packed["attn_q"] = TransformedArray(rtn(b.weights["attn_q"], Scheme(8, -1)), input_scale=jnp.full(64, 2.0))
    folded = fold(packed, PAIRS[0], scale_for(PAIRS[0], b), b.config)
    assert isinstance(folded["attn_k"], TransformedArray)
    assert isinstance(folded["attn_q"].inner, QuantizedArray)
    np.testing.assert_allclose(b.outputs(folded, b.inputs), b.outputs(packed, b.inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_block_is_packed_and_near_what_it_was(method: Any) -> None:
    b = block(scheme=Scheme(8, -1, activations="int8"), dtype=jnp.float16)
    weights, lines, *_ = method(b)
    assert [line.name for line in lines] == list(MATRICES)
    assert all(isinstance(weights[name], TransformedArray) and weights[name].rounding == "int8" for name in MATRICES)
    assert all(0 < line.output_error < 1e-3 and 0 < line.weight_error < 1e-2 for line in lines)
    true = b.outputs(b.weights, b.inputs)
    assert np.square(b.outputs(weights, b.inputs) - true).mean() < 1e-3 * np.square(true).mean()
    assert weights.keys() == b.weights.keys()
    if not method.fold:
        assert all(weights[name] is b.weights[name] for name in b.weights if name not in MATRICES)


@pytest.mark.parametrize("kept", [("attn_k", "ffn_up", "ffn_down"), ("attn_v", "ffn_gate")])
def test_matrices_without_a_scheme_stay_float(kept: tuple[str, ...]) -> None:
    b = block(scheme=Scheme(3, 16), dtype=jnp.float16)
    b = dataclasses.replace(b, schemes={name: s for name, s in b.schemes.items() if name not in kept})
    weights, lines, *_ = AWQ()(b)
    assert {line.name for line in lines} == b.schemes.keys()
    assert all(weights[name].dtype == jnp.float16 for name in kept)
    true = b.outputs(b.weights, b.inputs)
    assert np.square(b.outputs(weights, b.inputs) - true).mean() < 0.1 * np.square(true).mean()


def test_awq_loses_less_than_rounding_to_nearest() -> None:
    b = block(scheme=Scheme(3, 16))
    true = b.outputs(b.weights, b.inputs)
    error = lambda weights: np.square(b.outputs(weights, b.inputs) - true).mean()
    plain = error(b.weights | {name: rtn(b.weights[name], scheme) for name, scheme in b.schemes.items()})
    found = {method: method(b) for method in (AWQ(), AWQ(fold=False))}
    for weights, lines, *_ in found.values():
        assert error(weights) < 0.8 * plain
        assert any("ratio" in line.note for line in lines)
    # The values' rows are tied where they carry the scale.
    assert isinstance(found[AWQ(fold=False)][0]["attn_output"], TransformedArray)


@pytest.mark.parametrize(("seed", "clipped"), [(0, True), (1, False)])
def test_queries_and_keys_are_clipped_where_the_output_is_nearer(
    seed: int, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = block("llama", 4, scheme=Scheme(2, 16, symmetric=False), samples=6, seed=seed)
    # The decision looks at one batch, with all else as it was: here at all that is measured.
    b = dataclasses.replace(b, schemes={name: b.schemes[name] for name in ("attn_q", "attn_k")}, batch=6)
    true = b.outputs(b.weights, b.inputs)
    error = lambda method: float(np.square(b.outputs(method(b)[0], b.inputs) - true).mean())
    found, whole = error(AWQ(n_grid=8)), error(AWQ(n_grid=8, clip=False))
    monkeypatch.setattr("qjax.calibrate.methods.awq._unclipped", lambda *_: ())
    shrunk = error(AWQ(n_grid=8))
    assert found == (shrunk if clipped else whole)
    assert found < 0.7 * (whole if clipped else shrunk)


def test_the_same_block_gives_the_same_bits() -> None:
    b = block(scheme=Scheme(3, 16))
    (first, lines, *_), (second, again, *_) = AWQ()(b), AWQ()(b)
    assert all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(leaves, (first, second)), strict=True))
    assert [line._replace(seconds=0) for line in lines] == [line._replace(seconds=0) for line in again]


def leaves(weights: dict[str, Any]) -> list[Any]:
    return jax.tree.leaves(weights)


def test_moments_are_of_all_samples() -> None:
    """The last batch being a smaller one, too."""
    b = block(samples=6)
    found = block_sums(b)
    assert [pair.names for pair in PAIRS] == sorted(found, key=lambda names: MATRICES.index(names[0]))
    assert all(float(m.tokens) == 72 for m in found.values())


def test_options_out_of_range_are_refused() -> None:
    for make in (lambda: AWQ(n_grid=0), lambda: AWQ(max_shrink=1.0), lambda: SmoothQuant(alpha=1.5)):
        with pytest.raises(QjaxError, match="expected"):
            make()
