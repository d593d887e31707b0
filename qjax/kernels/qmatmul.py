"""The one operation: y = qmatmul(x, w), and the table of kernels it picks from.

A kernel is picked by what the weight is (family and layout), how many rows x has, and the named choice of activations;
never by a global backend, since arrays of a CPU and of a GPU live in one program. The first entry of KERNELS that
serves the case wins; `explain` tells which one that is.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qjax.arrays import GroupedArray, LaneBlockedArray, Partitioned, QuantizedArray
from qjax.arrays.base import take_rows
from qjax.arrays.transformed import TransformedArray, rounded
from qjax.kernels import native
from qjax.kernels.int8 import matmul_int8_few, matmul_int8_many
from qjax.kernels.native import lanes_of, matmul_native, matmuls_native, serves, sums_tokens
from qjax.kernels.reference import matmul_reference
from qjax.kernels.tiles import matmul_tiles
from qjax.kernels.tokens import matmul_tokens, multiplies_tokens

Activations = Literal["float", "int8"]
Matmul = Callable[[Float[Array, "rows in"], Any], Float[Array, "rows out"]]

# Rows of x up to which the XLA kernel for few rows is used, and the native one of 16-bit floats.
FEW, FEW_DENSE = 4, 8


class Kernel(NamedTuple):
    """`serves(weight, rows, activations)` tells whether `run(x, weight)` may be used."""

    name: str
    serves: Callable[[Any, int, str], bool]
    run: Matmul


def _inner(weight: Any) -> Any:
    return weight.inner if isinstance(weight, TransformedArray) else weight


def _rounding(weight: Any) -> str | None:
    """What the weight itself says that x is rounded to."""
    return weight.rounding if isinstance(weight, TransformedArray) else None


def _is_w8a8(weight: Any) -> bool:
    """Whether x is rounded to int8 token by token, and the codes are integers to multiply that with."""
    lanes = lanes_of(weight)
    return _rounding(weight) == "int8" and multiplies_tokens(_inner(weight) if lanes is None else lanes.inner)


def _rounds(weight: Any, activations: str) -> bool:
    """Whether x is rounded by groups: of grouped codes there are integer products. Nothing is rounded twice."""
    inner = _inner(weight)
    codes = inner.inner if isinstance(inner, LaneBlockedArray) else inner
    return activations == "int8" and isinstance(codes, GroupedArray) and _rounding(weight) is None


def _straight_through(run: Matmul) -> Matmul:
    """Differentiate a product of rounded activations as if they were not rounded (Bengio et al. 2013)."""
    through = jax.custom_jvp(run)
    through.defjvp(lambda primals, tangents: (run(*primals), jax.jvp(matmul_float, primals, tangents)[1]))
    return through


def _on_changed_x(run: Matmul) -> Matmul:
    """A kernel that knows no transformed weights, for these too, but for their rounding."""

    def changed(x: Any, weight: Any) -> Any:
        return run(weight.transform(x), weight.inner) if isinstance(weight, TransformedArray) else run(x, weight)

    return changed


def _in_rows(run: Matmul) -> Matmul:
    """A kernel that reads rows side by side, for weights in lanes too."""
    return _on_changed_x(lambda x, weight: run(x, weight.plain() if isinstance(weight, LaneBlockedArray) else weight))


def _rounded_first(x: Float[Array, "rows in"], weight: TransformedArray) -> Float[Array, "rows out"]:
    """x rounded as the weight says, and multiplied as floats."""
    return select(weight.inner, x.shape[0]).run(rounded(x, weight), weight.inner)


matmul_float = _in_rows(matmul_tiles)
matmul_w8a8 = _straight_through(lambda x, weight: matmul_tokens(x, weight.plain()))
matmul_int8 = _straight_through(
    _in_rows(lambda x, weight: (matmul_int8_few if x.shape[0] <= FEW else matmul_int8_many)(x, weight))
)

# How native kernels round x, and what runs on other platforms.
_NATIVE: dict[str, tuple[Any, Matmul]] = {
    "native-w8a8": ("tokens", matmul_w8a8),
    "native-int8": ("groups", matmul_int8),
    "native": ("none", matmul_float),
}


def _native(name: str) -> Matmul:
    rounding, elsewhere = _NATIVE[name]
    return partial(matmul_native, rounding=rounding, elsewhere=elsewhere)


KERNELS: list[Kernel] = [
    Kernel("native-w8a8", lambda w, m, a: _is_w8a8(w) and sums_tokens(w), _native("native-w8a8")),
    Kernel("xla-w8a8", lambda w, m, a: _is_w8a8(w), matmul_w8a8),
    Kernel("rounded", lambda w, m, a: _rounding(w) is not None, _rounded_first),
    Kernel(
        "native-int8",
        lambda w, m, a: _rounds(w, a) and lanes_of(w) is not None and serves(w),
        _native("native-int8"),
    ),
    Kernel(
        "native",
        lambda w, m, a: (lanes_of(w) is not None or m <= FEW_DENSE) and serves(w),
        _native("native"),
    ),
    Kernel("xla-int8", lambda w, m, a: _rounds(w, a), matmul_int8),
    Kernel("xla-dot", lambda w, m, a: getattr(w, "dtype", None) == jnp.float32, matmul_reference),
    Kernel("xla-tiles", lambda w, m, a: True, matmul_float),
]


def default_activations(platform: str | None = None) -> Activations:
    """What generating text uses unless told: "int8" where the native CPU kernels run, else "float".

    `platform` is that of the device; None for JAX's default.

    On a CPU integer products decode 4-bit weights about 1.5 times as fast as float ones and prompts 2.5 times; where
    there are no such kernels rounding buys nothing.
    """
    return "int8" if (platform or jax.default_backend()) == "cpu" and native.available() else "float"


def select(weight: Any, rows: int, activations: Activations = "float") -> Kernel:
    """The kernel that `qmatmul` uses for this weight and this many rows of x.

    Raises:
      ValueError: an unknown choice of activations.
    """
    if activations not in get_args(Activations):
        raise ValueError(f"expected activations of {get_args(Activations)}, got {activations!r}")
    for kernel in KERNELS:
        if kernel.serves(weight, rows, activations):
            return kernel
    raise ValueError(f"no kernel serves {weight!r}")


def explain(weight: Any, rows: int, activations: Activations = "float") -> str:
    """One line: which kernel runs, on what."""
    inner = weight.weight if isinstance(weight, Partitioned) else weight
    return f"{select(inner, rows, activations).name}: {rows} rows x {describe(weight)}, {activations} activations"


def describe(weight: Any) -> str:
    """A packed or float weight in a few words."""
    return repr(weight) if isinstance(weight, QuantizedArray | Partitioned) else f"{weight.dtype}{weight.shape}"


def qmatmuls(
    x: Float[Array, "*batch in"], weights: Sequence[Any], *, activations: Activations = "float"
) -> tuple[Float[Array, "*batch _"], ...]:
    """`qmatmul` of one x with several weights (queries, keys and values; gate and up), in one call where a kernel can.

    Raises:
      ValueError: see `qmatmul`.
    """
    rows = math.prod(x.shape[:-1])
    if len(weights) > 1 and all(map(_only_rounds_to_float8, weights)):
        changed = rounded(x.astype(jnp.float32), weights[0])
        return tuple(y.astype(_result_dtype(x)) for y in qmatmuls(changed, [weight.inner for weight in weights]))
    together = all(lanes_of(weight) is not None and weight.shape[-1] == x.shape[-1] for weight in weights)
    names = {select(weight, rows, activations).name for weight in weights} if together else set()
    if len(names) != 1 or (name := names.pop()) not in _NATIVE:
        return tuple(qmatmul(x, weight, activations=activations) for weight in weights)
    rounding, elsewhere = _NATIVE[name]
    flat = x.reshape(rows, x.shape[-1]).astype(jnp.float32)
    products = matmuls_native(flat, weights, rounding=rounding, elsewhere=elsewhere)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]).astype(_result_dtype(x)) for y in products)


def _only_rounds_to_float8(weight: Any) -> bool:
    """Whether the weight changes x by a rounding of each token, and by nothing else: once for all that do."""
    others = ("columns", "input_scale", "x_scale")
    return _rounding(weight) == "float8_e4m3fn" and all(getattr(weight, name) is None for name in others)


def _result_dtype(x: Any) -> Any:
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32


def qmatmul(
    x: Float[Array, "*batch in"],
    weight: Any,
    *,
    activations: Activations = "float",
) -> Float[Array, "*batch out"]:
    """x @ dequantize(weight).T with the weight kept packed.

    A weight that is to be cut over devices must be a `Partitioned` one: of a weight that was merely put there with a
    sharding, the compiler gathers the packed bytes first.

    Args:
      x: float activations; computed in float32, returned in x's dtype.
      weight: a QuantizedArray or float array [out, in], or a Partitioned one, for which the kernel runs inside a
        shard_map over the weight's mesh.
      activations: "int8" rounds x by groups before multiplying integers; a weight that says itself how x is rounded
        is not asked twice.

    Raises:
      ValueError: x's last axis is not the weight's in_features.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"expected x with {weight.shape[-1]} columns for weight {weight.shape}, got {x.shape}")
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if isinstance(weight, TransformedArray) and isinstance(weight.inner, Partitioned):
        activations = activations if weight.rounding is None else "float"
        flat, weight = rounded(flat, weight), weight.inner
    if isinstance(weight, Partitioned):
        y = _sharded(flat, weight, activations)
    else:
        y = select(weight, flat.shape[0], activations).run(flat, weight)
    return y.reshape(*x.shape[:-1], weight.shape[0]).astype(_result_dtype(x))


def _sharded(x: Float[Array, "rows in"], weight: Partitioned, activations: Activations) -> Float[Array, "rows out"]:
    run = select(weight.weight, x.shape[0], activations).run
    along_out = weight.side == "out"

    @partial(
        jax.shard_map,
        mesh=weight.mesh,
        in_specs=(PartitionSpec() if along_out else PartitionSpec(None, weight.axis), weight.spec),
        out_specs=PartitionSpec(None, weight.axis) if along_out else PartitionSpec(),
        check_vma=False,
    )
    def local(x: Any, part: Any) -> Any:
        y = run(x, part)
        return y if along_out else lax.psum(y, weight.axis)

    return local(x, weight.weight)


def qtake(weight: Any, rows: Int[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, "... in"]:
    """Rows of an embedding: only the rows asked for are dequantized. Ids past the end give the last row."""
    if isinstance(weight, Partitioned):
        weight = weight.weight
    if isinstance(weight, QuantizedArray):
        return weight.take(rows, dtype)
    return take_rows(weight, rows.reshape(-1)).astype(dtype).reshape(*rows.shape, weight.shape[-1])
