"""Keys and values as int8: how far from the floats, and attention over them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels import Int8Slots, attend, attention, attention_mask, native, stored_as
from qjax.kernels.slots import empty_slots, to_slots


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_an_entry_is_off_by_half_a_step_at_most() -> None:
    x = numbers(2, 3, 5, 32) * jnp.logspace(-20, 20, 5).reshape(1, 1, 5, 1)
    held = to_slots(x)
    assert (held.codes.dtype, held.scale.dtype, held.scale.shape) == (jnp.int8, jnp.float32, (2, 3, 5))
    assert int(jnp.abs(held.codes.astype(jnp.int32)).max()) == 127
    off = np.abs(np.asarray(held.floats()) - np.asarray(x))
    assert (off <= np.abs(np.asarray(x)).max(-1, keepdims=True) / 254 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(to_slots(jnp.zeros((1, 8))).floats(), np.zeros((1, 8)))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(number: float) -> None:
    held = to_slots(numbers(2, 16).at[1, 3].set(number)).floats()
    assert np.isfinite(np.asarray(held[0])).all()
    assert np.isnan(np.asarray(held[1])).all()


def test_half_the_bytes_of_16_bit_floats() -> None:
    shape = (1, 4, 256, 128)
    held, floats = empty_slots(shape, jnp.int8), empty_slots(shape, jnp.float16)
    assert isinstance(held, Int8Slots)
    assert held.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(held)) == floats.nbytes * (128 + 4) // 256
    assert stored_as(numbers(1, 4, 1, 128), floats).dtype == jnp.float16
    assert isinstance(stored_as(numbers(1, 4, 1, 128), held), Int8Slots)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seq", [1, 5])
def test_attention_is_that_of_the_entries(window: int | None, seq: int) -> None:
    q, k, v = numbers(2, seq, 8, 32), numbers(2, 4, 40, 32, seed=1), numbers(2, 4, 40, 32, seed=2)
    positions = jnp.asarray([[20], [33]], jnp.int32) + jnp.arange(seq, dtype=jnp.int32)[None]
    held = to_slots(k), to_slots(v)
    ours: Any = jax.jit(attend, static_argnums=4)(q, *held, positions, window)
    same = attention(q, held[0].floats(), held[1].floats(), attention_mask(positions, 40, window))
    np.testing.assert_allclose(ours, same, atol=2e-6)
    exact = attention(q, k, v, attention_mask(positions, 40, window))
    off = np.abs(np.asarray(ours - exact)).max()
    assert 1e-5 < off < 0.03


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
def test_the_native_kernel_reads_the_codes() -> None:
    k = to_slots(numbers(1, 2, 16, 32))
    program = jax.jit(attend, static_argnums=4).lower(numbers(1, 1, 4, 32), k, k, jnp.zeros((1, 1), jnp.int32), None)
    assert "custom_call @qjax_attention_ffi" in program.as_text()
