"""A C++ handler as a JAX function of arrays."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.kernels.native.library import isa_number


def _call(target: str, attributes: tuple[tuple[str, Any], ...], *arrays: Any) -> Any:
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32), vmap_method="sequential")
    return call(*jax.tree.leaves(arrays), **dict(attributes), isa=np.int64(isa_number()))


@functools.cache
def native_function(
    target: str, elsewhere: Callable[..., Any], attributes: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """The handler on CPU, `elsewhere(*arrays)` on other platforms; float32 of the first array's shape.

    What is a tree of arrays goes to the handler leaf by leaf.

    Differentiable as `elsewhere` is. One function for each choice: what is compiled for it is found again.
    """

    here = partial(_call, target, attributes)

    @jax.custom_jvp
    def run(*arrays: Any) -> Any:
        return lax.platform_dependent(*arrays, cpu=here, default=elsewhere)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return run(*primals), jax.jvp(elsewhere, primals, tangents)[1]

    return run
