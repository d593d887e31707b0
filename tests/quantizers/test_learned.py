"""Learned rounding: at first the start, then within bounds; what is trained on is what is stored."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import AffineArray, Scheme, affine
from qjax.quantizers.learned import Offsets, anchored, bounded, descended, fake_quantized, packed
from qjax.quantizers.rtn import rtn

SCHEMES = [Scheme(2, 32, False), Scheme(3, 64), Scheme(4, -1, False), Scheme(4, 0), Scheme(8, 32)]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def weights(seed: int = 0, shape: tuple[int, int] = (24, 64)) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def moved(offsets: Offsets, seed: int) -> Offsets:
    """Offsets anywhere within bounds."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.uniform(-0.6, 0.6, leaf.shape).astype(np.float32))
    return bounded(jax.tree.map(draw, offsets))


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(bool(jnp.array_equal(x, y)) for x, y in pairs)


@by_scheme
def test_no_offsets_are_the_start(scheme: Scheme) -> None:
    w = weights()
    start = rtn(w, scheme)
    anchor, offsets = anchored(w, start, scheme)
    assert same(packed(offsets, anchor, scheme), start)


@by_scheme
def test_a_start_of_any_codes_is_kept(scheme: Scheme) -> None:
    """As GPTQ's are: not the nearest ones of the true weights."""
    w = weights()
    near = rtn(w, scheme)
    codes = jnp.asarray(np.random.default_rng(1).integers(0, scheme.max_code + 1, w.shape, dtype=np.uint8))
    start = affine(codes, near.scale, near.zero, scheme.bits)
    anchor, offsets = anchored(w, start, scheme)
    assert same(packed(offsets, anchor, scheme), start)


@by_scheme
def test_weights_that_the_start_rounds_to_nearest_are_not_moved(scheme: Scheme) -> None:
    w = weights()
    anchor, _ = anchored(w, rtn(w, scheme), scheme)
    np.testing.assert_allclose(anchor.w.reshape(w.shape), w, atol=0.011 * float(anchor.scale.max()))


@by_scheme
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_trained_on_is_what_is_stored(scheme: Scheme, seed: int) -> None:
    w = weights(seed)
    anchor, offsets = anchored(w, rtn(w, scheme), scheme)
    offsets = moved(offsets, seed)
    array = packed(offsets, anchor, scheme)
    assert array.scale.dtype == jnp.float16
    trained = jax.jit(fake_quantized, static_argnums=2)(offsets, anchor, scheme)
    np.testing.assert_array_equal(jax.jit(AffineArray.dequantize)(array), trained)
    assert len(np.unique(np.asarray(array.scale))) == 1 or scheme.group_size != 0


@by_scheme
def test_gradients_are_those_of_what_is_rounded_by_fixed_amounts(scheme: Scheme) -> None:
    """Finite differences of the same function, in float64, with what each rounding added held fast."""
    w = weights(3, (4, 64))
    anchor, offsets = anchored(w, rtn(w, scheme), scheme)
    offsets = moved(offsets, 3)
    slopes = np.random.default_rng(4).normal(size=w.shape)
    loss = lambda o: jnp.sum(fake_quantized(o, anchor, scheme) * jnp.asarray(slopes, jnp.float32))
    grads = jax.jit(jax.grad(loss))(offsets)
    w64, scale64, zero64 = (np.asarray(leaf, np.float64) for leaf in anchor)
    held: list[np.ndarray] = []

    def hold(f: Any, x: np.ndarray, fixed: list[np.ndarray] | None) -> np.ndarray:
        added = f(x) - x if fixed is None else fixed.pop(0)
        held.append(added)
        return x + added

    def surrogate(o: Any, fixed: list[np.ndarray] | None) -> float:
        half = lambda x: x.astype(np.float16).astype(np.float64)
        scale = hold(half, scale64 * (1 + o[1]), fixed)
        zero = zero64
        if o[2] is not None:
            zero = np.clip(hold(np.round, zero + scheme.middle * o[2], fixed), 0, scheme.max_code)
        codes = np.clip(hold(np.round, w64 / scale + o[0], fixed) + zero, 0, scheme.max_code)
        return float(np.sum((scale * (codes - zero)).reshape(w.shape) * slopes))

    at = [None if leaf is None else np.asarray(leaf, np.float64) for leaf in offsets]
    surrogate(at, None)
    added = list(held)
    rng = np.random.default_rng(5)
    # A clipped code has no slope on either side only where it is not at the very edge, which a random one is not.
    for which, leaf in enumerate(at):
        if leaf is None:
            continue
        for _ in range(6):
            place = tuple(int(rng.integers(n)) for n in leaf.shape)
            step, ends = 1e-6, []
            for sign in (1, -1):
                there = [None if x is None else x.copy() for x in at]
                there[which][place] += sign * step
                ends.append(surrogate(there, list(added)))
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(float(grads[which][place]), expected, rtol=2e-3, atol=2e-3)


def test_offsets_stay_within_bounds() -> None:
    offsets = Offsets(*(jnp.asarray([[[-3.0, -0.2, 0.2, 3.0]]], jnp.float32) for _ in range(3)))
    found = bounded(offsets)
    np.testing.assert_allclose(found.rounding.ravel(), [-0.5, -0.2, 0.2, 0.5])
    np.testing.assert_allclose(found.scale.ravel(), [-0.5, -0.2, 0.2, 0.5])
    np.testing.assert_allclose(found.zero.ravel(), [-1, -0.2, 0.2, 1])


@pytest.mark.parametrize("scheme", [Scheme(2, 32, False), Scheme(3, 64)], ids=str)
def test_output_error_is_less_than_rtns(scheme: Scheme) -> None:
    """On inputs that go together, also of tokens that were not trained on."""
    rng = np.random.default_rng(6)
    mix = rng.normal(size=(16, 64))
    draw = lambda n: jnp.asarray((rng.normal(size=(n, 16)) @ mix + 0.3 * rng.normal(size=(n, 64))).astype(np.float32))
    x, other = draw(256), draw(256)
    w = weights(7)
    start = rtn(w, scheme)
    anchor, offsets = anchored(w, start, scheme)
    error = lambda w_hat, x: jnp.mean(jnp.square(x @ (w_hat - w).T))
    steps = 60

    @jax.jit
    def step(offsets: Offsets, rate: Any) -> Any:
        slopes = jax.grad(lambda o: error(fake_quantized(o, anchor, scheme), x))(offsets)
        return descended(offsets, slopes, rate)

    for i in range(steps):
        offsets = step(offsets, jnp.float32((1 - i / steps) / steps))
    found = packed(offsets, anchor, scheme)
    assert isinstance(found, AffineArray)
    assert float(error(found.dequantize(), x)) < 0.6 * float(error(start.dequantize(), x))
    assert float(error(found.dequantize(), other)) < 0.7 * float(error(start.dequantize(), other))
