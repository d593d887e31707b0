"""What lies around the products, by the C++ kernels: RMS norm, the gate of SwiGLU, rotary embedding; float32, on CPU.

XLA:CPU makes several passes of each and computes the exponentials one at a time: beside products that run at the
memory's speed that is a tenth of a prompt's time.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.kernels.native.call import native_function
from qjax.kernels.native.library import RMS_NORM_TARGET, ROPE_TARGET, SWIGLU_TARGET, available


def serves_elementwise(*arrays: Any) -> bool:
    """Whether the C++ kernels take these arrays, and are there."""
    return all(a.dtype == jnp.float32 and a.size > 0 for a in arrays) and available()


def rms_norm_native(x: Any, weight: Any, eps: float, elsewhere: Callable[..., Any]) -> Any:
    """`nn.rms_norm` of [..., n] by weight [n]; differentiable as `elsewhere(x, weight)` is."""
    return native_function(RMS_NORM_TARGET, elsewhere, (("eps", np.float32(eps)),))(x, weight)


def swiglu_native(gate: Any, up: Any, elsewhere: Callable[..., Any]) -> Any:
    """`nn.swiglu` of two arrays of one shape; differentiable as `elsewhere(gate, up)` is."""
    return native_function(SWIGLU_TARGET, elsewhere, ())(gate, up)


def rope_native(x: Any, cosine: Any, sine: Any, *, interleaved: bool, elsewhere: Callable[..., Any]) -> Any:
    """`nn.rope` of [batch, seq, heads, dim]; differentiable as `elsewhere(x, cosine, sine)` is."""
    return native_function(ROPE_TARGET, elsewhere, (("interleaved", bool(interleaved)),))(x, cosine, sine)
