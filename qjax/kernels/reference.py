"""The reference: dequantize the whole weight, then multiply. What every other kernel is tested against."""

from typing import Any

from jax import lax
from jaxtyping import Array, Float

from qjax.kernels.tiles import as_floats


def matmul_reference(x: Float[Array, "rows in"], weight: Any) -> Float[Array, "rows out"]:
    """float32 x @ dequantize(weight).T. Holds a float copy of the weight."""
    return lax.dot_general(x, as_floats(weight), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
