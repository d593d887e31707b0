"""The C++ kernels as JAX functions: every lane-blocked family, any number of rows of x, on CPU; 16-bit floats for few.

`src/core.h` describes what the kernels read. Weights that share their x go in one call: x is made ready once, and the
threads are woken once. Of transformed weights the kernels change x themselves, once for neighbours that do it alike.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax.arrays import (
    AffineArray,
    CodebookArray,
    FloatCodebookArray,
    LaneBlockedArray,
    ScaledFloatArray,
    TransformedArray,
    TwoLevelArray,
)
from qjax.kernels.native.library import DENSE_TARGET, MATMUL_TARGET, available, isa_number

# core.h's qjax_scale_kind.
_FLOAT_KINDS = {"float16": 0, "float32": 1, "bfloat16": 8}
_E8M0, _PACKED = 2, 9
_TWO_LEVEL_KINDS = {"q2_k": 3, "q3_k": 4, "q4_k": 5, "q6_k": 6, "iq4_xs": 7}

# core.h's qjax_value_kind.
_INTEGERS, _VALUES = 0, 3
_VALUE_KINDS = {"float8_e4m3fn": 1, "float8_e5m2": 2}

# Weights of one call at most, as in matmul.cc.
MOST_TOGETHER = 8

# How x is rounded, by core.h's qjax_rounding: not, to int8 in groups of 32 columns, or to int8 token by token.
Rounding = Literal["none", "groups", "tokens"]
_ROUNDINGS = {"none": 0, "groups": 1, "tokens": 2}
# core.h's QJAX_MOST_SUMMED: columns of a scale whose integers are summed first.
_MOST_SUMMED = 65536

Elsewhere = Callable[[Float[Array, "rows in"], Any], Float[Array, "rows out"]]


def _scales(inner: Any) -> tuple[int, dict[str, Any]] | None:
    """core.h's kind of scale and the leaves it reads, in src/handler.cc's order; None for dtypes it does not know."""
    leaves = {}
    if isinstance(inner, TwoLevelArray):
        leaves = {"scale": inner.super_scale, "sub": inner.sub_scales, "minimum": inner.super_minimum}
        kind = _TWO_LEVEL_KINDS.get(inner.packing)
        wanted = "float16"
    elif isinstance(inner, CodebookArray):
        leaves = {"scale": inner.scale, "sub": inner.sub_scales}
        kind = {"e8m0": _E8M0, "two_level": _TWO_LEVEL_KINDS["iq4_xs"], "float": 0}[inner.scale_kind]
        wanted = "uint8" if inner.scale_kind == "e8m0" else "float16"
    elif isinstance(inner, AffineArray):
        leaves = {"scale": inner.scale, "minimum": inner.minimum, "zero": inner.zero}
        wanted = str(inner.scale.dtype)
        kind = _FLOAT_KINDS.get(wanted)
    elif isinstance(inner, ScaledFloatArray):
        leaves = {"scale": inner.scale}
        wanted = str(inner.scale.dtype)
        kind = _FLOAT_KINDS.get(wanted)
    elif isinstance(inner, FloatCodebookArray):
        leaves = {"scale": inner.scale, "super": inner.super_scale, "start": inner.start}
        wanted = str(inner.scale.dtype)
        kind = _FLOAT_KINDS.get(wanted) if inner.super_scale is None else _PACKED
    else:
        return None
    floats = [leaves[name] for name in ("scale", "minimum") if leaves.get(name) is not None]
    return None if kind is None or any(str(leaf.dtype) != wanted for leaf in floats) else (kind, leaves)


def dense_kind(weight: Any) -> str | None:
    """ "f16" or "bf16" for a matrix of such floats."""
    kinds = {"float16": "f16", "bfloat16": "bf16"}
    return kinds.get(str(weight.dtype)) if isinstance(weight, jax.Array) and weight.ndim == 2 else None


def knows(array: Any) -> bool:
    """Whether the C++ kernels read scales of this kind and dtype, once the array is in lanes."""
    return _scales(array) is not None


def _values(inner: Any) -> dict[str, Any]:
    """What codes stand for where they are no integers, as attributes of the call."""
    kind, values, block, offset, table = _INTEGERS, (), 1, 0.0, b""
    if isinstance(inner, ScaledFloatArray):
        kind = _VALUE_KINDS[inner.kind]
    elif isinstance(inner, FloatCodebookArray):
        kind, values = _VALUES, inner.table
        if inner.super_scale is not None:
            block, offset, table = inner.scale_block, inner.scale_offset, inner.scale_table
    return {
        "value_kind": np.array([kind], np.int64),
        "values": np.array(values or (0,) * 16, np.float32),
        "scale_block": np.array([block], np.int64),
        "scale_offset": np.array([offset], np.float32),
        "scale_tables": np.frombuffer(table, np.float32),
    }


def lanes_of(weight: Any) -> Any:
    """The array in lanes that a weight is, or that lies in a transformed one; None for others."""
    inner = weight.inner if isinstance(weight, TransformedArray) else weight
    return inner if isinstance(inner, LaneBlockedArray) else None


def serves(weight: Any) -> bool:
    """Whether the C++ kernels know this weight (and what changes its x first, but for rounding), and are there."""
    lanes = lanes_of(weight)
    known = dense_kind(weight) is not None if lanes is None else knows(lanes.inner)
    return known and available()


def sums_tokens(weight: Any) -> bool:
    """Whether they sum such products of a weight that `kernels.tokens` multiplies: not of halves of a step."""
    lanes = lanes_of(weight)
    return lanes is not None and serves(weight) and 16 < lanes.group_size <= _MOST_SUMMED


def matmul_native(x: Float[Array, "rows in"], weight: Any, *, rounding: Rounding, elsewhere: Elsewhere) -> Any:
    """float32 x @ dequantize(weight).T in one pass over the packed bytes; differentiable as `elsewhere` is.

    Args:
      rounding: "groups" rounds x as `kernels.int8` does, "tokens" as `kernels.tokens` does.
      elsewhere: the kernel for the other platforms that this program may be lowered to.
    """
    return matmuls_native(x, (weight,), rounding=rounding, elsewhere=elsewhere)[0]


def matmuls_native(
    x: Float[Array, "rows in"], weights: Sequence[Any], *, rounding: Rounding, elsewhere: Elsewhere
) -> tuple[Float[Array, "rows _"], ...]:
    """`matmul_native` for lane-blocked weights that share x (or one of 16-bit floats), at most MOST_TOGETHER a call."""
    products: list[Any] = []
    for start in range(0, len(weights), MOST_TOGETHER):
        products += _product(rounding, elsewhere)(x, tuple(weights[start : start + MOST_TOGETHER]))
    return tuple(products)


@functools.cache
def _product(rounding: Rounding, elsewhere: Elsewhere) -> Callable[[Any, Any], Any]:
    """One function for each choice, so that calls outside of jit find what they compiled before."""

    def others(x: Any, weights: Any) -> Any:
        return tuple(elsewhere(x, weight) for weight in weights)

    @jax.custom_jvp
    def matmul(x: Any, weights: Any) -> Any:
        here = _call_dense if dense_kind(weights[0]) else partial(_call, rounding=rounding)
        return lax.platform_dependent(x, weights, cpu=here, default=others)

    @matmul.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return matmul(*primals), jax.jvp(others, primals, tangents)[1]

    return jax.jit(matmul)


def _call_dense(x: Float[Array, "rows in"], weights: tuple[Any, ...]) -> tuple[Any, ...]:
    (weight,) = weights
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(DENSE_TARGET, result, vmap_method="sequential")
    return (call(x, weight, isa=np.int64(isa_number())),)


_CHANGES = {"columns": jnp.int32, "input_scale": jnp.float32, "x_scale": jnp.float32}


def _call(x: Float[Array, "rows in"], weights: tuple[Any, ...], *, rounding: Rounding) -> tuple[Any, ...]:
    leaves: list[Any] = []
    facts: dict[str, list[int]] = {}
    more: dict[str, list[np.ndarray]] = {}
    for transformed in weights:
        weight = lanes_of(transformed)
        changes = {name: getattr(transformed, name, None) for name in _CHANGES}
        inner = weight.inner
        found = _scales(inner)
        assert found is not None
        kind, scales = found
        table = inner.table if isinstance(inner, CodebookArray) else ()
        widths = [plane.width for plane in inner.layout]
        leaves += [*inner.planes, *(leaf for leaf in scales.values() if leaf is not None)]
        leaves += [leaf.astype(_CHANGES[name]) for name, leaf in changes.items() if leaf is not None]
        for name, value in _values(inner).items():
            more.setdefault(name, []).append(value)
        for name, value in {
            "plane_count": len(widths),
            "width0": widths[0],
            "width1": widths[1] if len(widths) > 1 else 0,
            "offset": getattr(inner, "offset", 0),
            "scale_kind": kind,
            "group_size": weight.group_size,
            "rows": weight.shape[0],
            "has_minimum": scales.get("minimum") is not None,
            "has_sub": scales.get("sub") is not None,
            "has_zero": scales.get("zero") is not None,
            "has_super": scales.get("super") is not None,
            **{f"has_{name}": leaf is not None for name, leaf in changes.items()},
            "has_table": bool(table),
        }.items():
            facts.setdefault(name, []).append(int(value))
        facts.setdefault("tables", []).extend(table or (0,) * 16)
    results = [jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32) for weight in weights]
    call = jax.ffi.ffi_call(MATMUL_TARGET, results, vmap_method="sequential")
    attributes = {name: np.array(values, np.int64) for name, values in facts.items()}
    attributes |= {name: np.concatenate(values) for name, values in more.items()}
    return tuple(call(x, *leaves, **attributes, rounding=np.int64(_ROUNDINGS[rounding]), isa=np.int64(isa_number())))
