"""The C++ kernel as a JAX function: every grouped family and 16-bit floats, few rows of x, on CPU."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax.arrays import AffineArray, CodebookArray, GroupedArray, TwoLevelArray
from qjax.arrays.planes import Layout
from qjax.kernels.native.build import TARGET, available

# (width, stride) of the planes that qmatmul.cc unpacks.
PLANES = {(4, 16), (4, 32), (4, 64), (2, 32), (1, 32), (1, 4), (8, 1)}


def _layout_known(layout: Layout) -> bool:
    return all((plane.width, plane.stride) in PLANES for plane in layout)


def _scales(weight: GroupedArray) -> tuple[str, list[Any]] | None:
    """qmatmul.cc's name for how the scales lie, and their leaves; None if it knows no such kind or dtype."""
    if isinstance(weight, TwoLevelArray):
        floats = [leaf for leaf in (weight.super_scale, weight.super_minimum) if leaf is not None]
        found = weight.packing, [weight.super_scale, weight.sub_scales, *floats[1:]]
        return found if all(leaf.dtype == jnp.float16 for leaf in floats) else None
    if isinstance(weight, CodebookArray):
        if weight.scale_kind == "e8m0":
            return ("e8m0", [weight.scale]) if weight.scale.dtype == jnp.uint8 else None
        if weight.scale.dtype != jnp.float16:
            return None
        two_level = weight.scale_kind == "two_level"
        return ("iq4_xs", [weight.scale, weight.sub_scales]) if two_level else ("half", [weight.scale])
    if isinstance(weight, AffineArray):
        kind = {"float16": "half", "float32": "float"}.get(str(weight.scale.dtype))
        leaves = [leaf for leaf in (weight.scale, weight.minimum) if leaf is not None]
        same = all(leaf.dtype == weight.scale.dtype for leaf in leaves)
        return None if kind is None or not same else (kind, leaves)
    return None


def _dense_kind(weight: Any) -> str | None:
    """ "f16" or "bf16" for a matrix of such floats."""
    kinds = {"float16": "f16", "bfloat16": "bf16"}
    return kinds.get(str(weight.dtype)) if isinstance(weight, jax.Array) and weight.ndim == 2 else None


def serves(weight: Any) -> bool:
    """Whether the C++ kernel knows this layout, and is there."""
    if _dense_kind(weight) is not None:
        return available()
    if not isinstance(weight, GroupedArray) or not _layout_known(weight.layout) or _scales(weight) is None:
        return False
    if isinstance(weight, AffineArray) and weight.bits == 8 and weight.offset != 128:
        return False
    return available()


def matmul_native(
    x: Float[Array, "rows in"],
    weight: Any,
    *,
    int8: bool,
    elsewhere: Callable[[Float[Array, "rows in"], Any], Float[Array, "rows out"]],
) -> Float[Array, "rows out"]:
    """float32 x @ dequantize(weight).T in one pass over the packed bytes; differentiable as `elsewhere` is.

    Args:
      int8: round x to int8 by groups of the weight, as `kernels.int8` does.
      elsewhere: the kernel for the other platforms that this program may be lowered to.
    """
    return _product(int8, elsewhere)(x, weight)


@functools.cache
def _product(int8: bool, elsewhere: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """One function for each choice, so that calls outside of jit find what they compiled before."""

    @jax.custom_jvp
    def matmul(x: Any, weight: Any) -> Any:
        return lax.platform_dependent(x, weight, cpu=partial(_call, int8=int8), default=elsewhere)

    @matmul.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return matmul(*primals), jax.jvp(elsewhere, primals, tangents)[1]

    return jax.jit(matmul)


def _call(x: Float[Array, "rows in"], weight: Any, *, int8: bool) -> Float[Array, "rows out"]:
    dense = _dense_kind(weight)
    scales = _scales(weight) if dense is None else (dense, [weight])
    assert scales is not None
    kind, leaves = scales
    layout = weight.layout if dense is None else ()
    minimum = getattr(weight, "minimum", None) is not None or getattr(weight, "super_minimum", None) is not None
    table = np.array(weight.table if isinstance(weight, CodebookArray) else (), np.int64)
    call = jax.ffi.ffi_call(
        TARGET, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32), vmap_method="sequential"
    )
    return call(
        x,
        *(weight.planes if dense is None else ()),
        *leaves,
        scale_kind=kind,
        widths=np.array([plane.width for plane in layout], np.int64),
        strides=np.array([plane.stride for plane in layout], np.int64),
        offset=np.int64(0 if getattr(weight, "offset", 0) == 128 else getattr(weight, "offset", 0)),
        table=table,
        groups=np.int64(weight.shape[-1] // weight.group_size if dense is None else 1),
        has_minimum=minimum,
        int8=int8,
    )
