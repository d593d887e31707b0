"""Rounding to nearest: within half a step of every weight that the grid holds, in as many bytes as promised."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.arrays import Scheme
from qjax.arrays.scheme import BITS
from qjax.quantizers.rtn import rtn


@settings(max_examples=25)
@given(st.sampled_from(BITS), st.sampled_from([-1, 0, 32, 64]), st.booleans(), st.integers(0, 2**32 - 1))
def test_weights_are_within_half_a_step(bits: int, group: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(bits, group, symmetric)
    w = np.random.default_rng(seed).normal(size=(2, 6, 64)).astype(np.float32)
    array = rtn(jnp.asarray(w), scheme)
    assert array.shape == w.shape
    assert array.scale.shape[-1] == scheme.groups(64)
    step = np.repeat(np.asarray(array.scale, np.float32), 64 // array.scale.shape[-1], axis=-1)
    # The largest of a symmetric group is half a step past the last code; float16 scales and zero points round too.
    assert (
        np.abs(np.asarray(array.dequantize()) - w) <= step * (1.002 if not symmetric else 0.5 + 2**bits * 6e-4)
    ).all()


def test_int8_and_int4_are_as_small_as_promised() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32))
    assert 2 * w.size / rtn(w, Scheme(8, -1)).nbytes >= 1.85
    assert 2 * w.size / rtn(w, Scheme(4, 128)).nbytes >= 3.5
