"""A weight whose input is changed first: columns in another order, scaled, or rounded.

GPTQ with act-order quantizes columns in the order of their importance, AWQ and SmoothQuant move a scale for each column
from the activations to the weights, and W8A8 checkpoints say that activations are rounded too.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Integer

from qjax.arrays.base import QuantizedArray
from qjax.arrays.floats import divide

_LARGEST = jnp.finfo(jnp.float32).max

Rounding = Literal["int8", "float8_e4m3fn"]


@struct.dataclass(repr=False)
class TransformedArray(QuantizedArray):
    """y = inner @ t(x), t(x)[j] = round(x / input_scale)[columns[j]].

    Leaves (arrays):
      inner: any packed weight [out, in].
      columns: int32 [in], the column of x that inner's column j is multiplied with; None for all in order.
      input_scale: float32 [in], what x is divided by; None for ones.
      x_scale: float32 [], the scale of rounded activations if it is fixed; None for one of each token, by its largest
        magnitude.
    Static:
      rounding: what x / input_scale is rounded to before it is multiplied; None for nothing.

    Other than the base says, `columns`, `input_scale` and `x_scale` have no axis of rows.
    """

    inner: Any
    columns: Any = None
    input_scale: Any = None
    x_scale: Any = None
    rounding: Rounding | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def column_unit(self) -> int:
        return self.inner.column_unit

    def transform(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """What `inner` is multiplied with, but for the rounding."""
        if self.input_scale is not None:
            x = x / self.input_scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return x if self.columns is None else jnp.take(x, self.columns, axis=-1)

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        """The floats that an x which is not rounded is multiplied with."""
        return self._restored(self.inner.dequantize(jnp.float32)).astype(dtype)

    def take(self, rows: Integer[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, "... in"]:
        return self._restored(self.inner.take(rows, jnp.float32)).astype(dtype)

    def _restored(self, w: Float[Array, "*lead in"]) -> Float[Array, "*lead in"]:
        if self.columns is not None:
            w = jnp.take(w, jnp.argsort(self.columns), axis=-1)
        if self.input_scale is not None:
            w = w / self.input_scale.reshape((1,) * (w.ndim - 1) + (-1,))
        return w

    def plain(self) -> "TransformedArray":
        return self.replace(inner=self.inner.plain())  # pyright: ignore[reportAttributeAccessIssue]

    def map_rows(self, f: Callable[[Any], Any]) -> Any:
        return self.replace(inner=self.inner.map_rows(f))  # pyright: ignore[reportAttributeAccessIssue]

    def describe(self) -> str:
        kinds = []
        if self.columns is not None:
            kinds.append("columns in another order")
        if self.input_scale is not None:
            kinds.append("inputs scaled")
        if self.rounding is not None:
            kinds.append(f"{self.rounding} activations, a {'fixed' if self.x_scale is not None else 'token'} scale")
        return ", ".join([self.inner.describe(), *kinds])


def round_activations(
    x: Float[Array, "*batch in"], rounding: Rounding, x_scale: Float[Array, ""] | None = None
) -> tuple[Array, Float[Array, "*batch 1"]]:
    """x as integers or 8-bit floats, and the float32 scale of each token (or the fixed one) that they are in.

    Symmetric: the largest magnitude of a token becomes 127.5 (int8, from -128 to 127) or 448 (float8_e4m3fn), as
    compressed-tensors has it; a row of zeros has scale 1.
    """
    x = x.astype(jnp.float32)
    if x_scale is None:
        most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        scale = divide(most, jnp.full((1,) * x.ndim, 127.5 if rounding == "int8" else 448.0, jnp.float32))
        scale = jnp.where(scale == 0, jnp.float32(1), scale)
    else:
        scale = jnp.broadcast_to(x_scale.astype(jnp.float32), (*x.shape[:-1], 1))
    # Infinities become the largest codes of a fixed scale; of a token with one nothing is left.
    quotient = divide(jnp.clip(x, -_LARGEST, _LARGEST), scale)
    if rounding == "int8":
        return jnp.clip(jnp.round(quotient), -128, 127).astype(jnp.int8), scale
    return jnp.clip(quotient, -448, 448).astype(jnp.float8_e4m3fn), scale


def rounded(x: Float[Array, "*batch in"], weight: TransformedArray) -> Float[Array, "*batch in"]:
    """`transform` and the rounding, as floats: what `inner` is multiplied with."""
    x = weight.transform(x)
    if weight.rounding is None:
        return x
    codes, scale = round_activations(x, weight.rounding, weight.x_scale)
    values = codes.astype(jnp.float32) * scale
    # Its gradient is that of x (Bengio et al. 2013).
    return x + lax.stop_gradient(values.astype(x.dtype) - x)


def on_inner(array: Any, f: Callable[[Any], Any]) -> Any:
    """`f` of an array, or of what lies in a transformed one."""
    if isinstance(array, TransformedArray):
        return array.replace(inner=f(array.inner))  # pyright: ignore[reportAttributeAccessIssue]
    return f(array)
