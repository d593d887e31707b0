"""Norm, gate and rotation: the native handlers against XLA's, under jit, vmap and grad."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels import native, nn

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

RNG = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    return jnp.asarray(RNG.standard_normal(shape).astype(np.float32))


def angles(batch: int, seq: int, half: int) -> Any:
    positions = jnp.asarray(RNG.integers(0, 4000, (batch, seq)).astype(np.int32))
    return nn.rope_angles(positions, jnp.asarray(10000.0 ** -np.linspace(0, 1, half), jnp.float32))


# What is called, its arrays, and the same by XLA.
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[..., Any]]] = {
    "norm": (lambda x, w: nn.rms_norm(x, w, 1e-5), (floats(2, 3, 100), floats(100)), nn._rms_norm(1e-5)),
    "norm of heads": (lambda x, w: nn.rms_norm(x, w, 1e-6), (floats(1, 700, 4, 32), floats(32)), nn._rms_norm(1e-6)),
    "gate": (nn.swiglu, (floats(1, 5, 333), floats(1, 5, 333)), nn._swiglu),
    **{
        f"rotation, interleaved={interleaved}": (
            lambda x, c, s, interleaved=interleaved: nn.rope(x, (c, s), interleaved=interleaved),
            (floats(2, 7, 3, 24), *angles(2, 7, 8)),
            nn._ROPES[interleaved],
        )
        for interleaved in (False, True)
    },
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def test_equals_xla(case: Any) -> None:
    ours, arrays, by_xla = case
    wanted = by_xla(*arrays)
    for f in (ours, jax.jit(ours)):
        np.testing.assert_allclose(f(*arrays), wanted, rtol=2e-6, atol=2e-6)
    assert "qjax_" in jax.jit(ours).lower(*arrays).compile().as_text()


def test_gradients_are_those_of_xla(case: Any) -> None:
    ours, arrays, by_xla = case
    wanted = jax.grad(lambda *a: jnp.sum(by_xla(*a) ** 2))(*arrays)
    np.testing.assert_allclose(jax.grad(lambda *a: jnp.sum(ours(*a) ** 2))(*arrays), wanted, rtol=1e-4, atol=1e-5)


def test_vmap(case: Any) -> None:
    ours, arrays, by_xla = case
    several = tuple(jnp.stack([a, 2 * a]) for a in arrays)
    wanted = jnp.stack([by_xla(*(a[i] for a in several)) for i in range(2)])
    np.testing.assert_allclose(jax.vmap(ours)(*several), wanted, rtol=2e-6, atol=4e-6)


def test_other_floats_and_nothing_stay_with_xla() -> None:
    half = floats(2, 32).astype(jnp.bfloat16)
    assert nn.rms_norm(half, floats(32), 1e-5).dtype == jnp.bfloat16
    assert nn.swiglu(half, half).dtype == jnp.bfloat16
    assert nn.rms_norm(jnp.zeros((0, 32)), floats(32), 1e-5).shape == (0, 32)


def test_what_is_not_finite_stays_so() -> None:
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        x = floats(3, 64).at[1, 5].set(bad)
        y = np.isfinite(nn.rms_norm(x, jnp.ones(64), 1e-5))
        assert y[0].all()
        assert not y[1, 5]
        assert y[2].all()
        gated = np.isfinite(nn.swiglu(x, jnp.ones((3, 64))))
        assert not gated[1, 5]
        assert gated.sum() == gated.size - 1


def test_memory_is_taken_over_without_a_copy() -> None:
    """Small and large arrays, some in one chunk: aligned, apart from each other, and JAX's own afterwards."""
    sizes: list[tuple[int, ...]] = [(3, 5), (1 << 20,), (40 << 20,), (7,), (0, 4)]
    shapes = list(zip(sizes, (np.float16, np.uint8, np.uint8, np.float32, np.uint8), strict=True))
    arrays = [native.empty(shape, dtype) for shape, dtype in shapes]
    for number, (array, (shape, dtype)) in enumerate(zip(arrays, shapes, strict=True)):
        assert (array.shape, array.dtype) == (shape, dtype)
        array[...] = number
    for number, array in enumerate(arrays):
        assert (array == number).all()
        held = jax.device_put(array, jax.devices("cpu")[0])
        if array.size:
            assert array.ctypes.data % 64 == 0
            assert held.unsafe_buffer_pointer() == array.ctypes.data
