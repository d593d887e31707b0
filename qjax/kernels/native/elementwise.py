"""What lies around the products, by the C++ kernels: RMS norm, the gate of SwiGLU, rotary embedding; float32, on CPU.

XLA:CPU makes several passes of each and computes the exponentials one at a time: beside products that run at the
memory's speed that is a tenth of a prompt's time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.kernels.native.library import RMS_NORM_TARGET, ROPE_TARGET, SWIGLU_TARGET, available, isa_number


def serves_elementwise(*arrays: Any) -> bool:
    """Whether the C++ kernels take these arrays, and are there."""
    return all(a.dtype == jnp.float32 and a.size > 0 for a in arrays) and available()


@functools.cache
def _native(target: str, elsewhere: Callable[..., Any], attributes: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The handler on CPU, `elsewhere(*arrays)` on other platforms; the result is of the first array's shape."""

    def here(*arrays: Any) -> Any:
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32), vmap_method="sequential")
        return call(*arrays, **dict(attributes), isa=np.int64(isa_number()))

    @jax.custom_jvp
    def run(*arrays: Any) -> Any:
        return lax.platform_dependent(*arrays, cpu=here, default=elsewhere)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return run(*primals), jax.jvp(elsewhere, primals, tangents)[1]

    return run


def rms_norm_native(x: Any, weight: Any, eps: float, elsewhere: Callable[..., Any]) -> Any:
    """`nn.rms_norm` of [..., n] by weight [n]; differentiable as `elsewhere(x, weight)` is."""
    return _native(RMS_NORM_TARGET, elsewhere, (("eps", np.float32(eps)),))(x, weight)


def swiglu_native(gate: Any, up: Any, elsewhere: Callable[..., Any]) -> Any:
    """`nn.swiglu` of two arrays of one shape; differentiable as `elsewhere(gate, up)` is."""
    return _native(SWIGLU_TARGET, elsewhere, ())(gate, up)


def rope_native(x: Any, cosine: Any, sine: Any, *, interleaved: bool, elsewhere: Callable[..., Any]) -> Any:
    """`nn.rope` of [batch, seq, heads, dim]; differentiable as `elsewhere(x, cosine, sine)` is."""
    return _native(ROPE_TARGET, elsewhere, (("interleaved", bool(interleaved)),))(x, cosine, sine)
