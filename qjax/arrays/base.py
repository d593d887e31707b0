"""What every packed weight has in common: a shape, a size, and floats to give back."""

import abc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from qjax.arrays.planes import Layout, layout_bits


def take_rows(leaf: Any, rows: Integer[Array, " n"]) -> Any:
    """Rows of an array, ids past the end giving the last one.

    16-bit floats are taken as bits: XLA:CPU would first make all of the table float32.
    """
    if leaf.dtype not in (jnp.float16, jnp.bfloat16):
        return jnp.take(leaf, rows, axis=0, mode="clip")
    bits = jnp.take(lax.bitcast_convert_type(leaf, jnp.uint16), rows, axis=0, mode="clip")
    return lax.bitcast_convert_type(bits, leaf.dtype)


class QuantizedArray(abc.ABC):
    """A weight [..., out_features, in_features] kept packed; a pytree of arrays.

    Invariants of every family:
      - each leaf is [..., out_features, bytes or groups of one row]: rows can be cut, gathered, sharded and
        stacked leaf by leaf without knowing the family;
      - shape and sizes are derived from the leaves, so they hold inside vmap, scan and shard_map;
      - the treedef holds what the codes mean and how they lie in memory, never a name or a shape.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(..., out_features, in_features)."""

    @abc.abstractmethod
    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        """The floats. In float32 they equal the format's reference bit for bit; other dtypes round those."""

    @property
    @abc.abstractmethod
    def column_unit(self) -> int:
        """in_features can be cut at multiples of this many columns."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What it is, in a few words: '4-bit, groups of 32, float16 scales'."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: codes, scales and all."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size if self.size else 0.0

    def plain(self) -> "QuantizedArray":
        """The same weight with its rows side by side: itself, unless it is laid out for kernels."""
        return self

    def map_rows(self, f: Callable[[Any], Any]) -> Any:
        """`f` on every leaf; f must treat axis -2 as rows and keep the last axis."""
        return jax.tree.map(f, self)

    def take(self, rows: Integer[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, "... in"]:
        """Dequantize the chosen rows of a 2-D array, and only these."""
        if self.ndim != 2:
            raise ValueError(f"expected a 2-D array to take rows from, got shape {self.shape}")
        flat = rows.reshape(-1)
        taken = self.map_rows(lambda leaf: take_rows(leaf, flat))
        return taken.dequantize(dtype).reshape(*rows.shape, self.shape[-1])

    def __repr__(self) -> str:
        try:
            shape = "x".join(map(str, self.shape))
            return f"{type(self).__name__}({shape}, {self.describe()}, {self.bits_per_weight:.2f} bits/weight)"
        except (AttributeError, TypeError, IndexError):
            # JAX prints trees whose leaves are placeholders (None, strings, shardings).
            return f"{type(self).__name__}(...)"


@jax.jit
def _map_scales(halves: Any) -> Any:
    """(scales, minimums) of each half; jitted, so that calls outside of jit do not compile a loop anew each time."""
    return lax.map(lambda half: (half.scales(), half.minimums()), halves)


class GroupedArray(QuantizedArray):
    """Codes with a scale (and perhaps a minimum) for each group of consecutive columns.

    w[o, i] = scale[o, g] * code[o, i] + minimum[o, g],  g = i // group_size

    The families differ in how the codes' values and the scales are stored; kernels need no more than this view.
    All keep codes as bit planes: `planes`, uint8 [..., out, in * width / 8] each, in the order of `layout`.
    """

    planes: Any
    layout: Layout

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return layout_bits(self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, nbytes = self.planes[0].shape
        return (*lead, nbytes * self.layout[0].per_byte)

    @abc.abstractmethod
    def codes(self) -> Integer[Array, "... out in"]:
        """The codes' values: small signed integers (int8), or uint8 where they need all 8 bits."""

    @abc.abstractmethod
    def scales(self) -> Float[Array, "... out groups"]:
        """float32 scale of each group."""

    @abc.abstractmethod
    def minimums(self) -> Float[Array, "... out groups"] | None:
        """float32 number added to each weight of a group; None for none."""

    @property
    @abc.abstractmethod
    def group_size(self) -> int:
        """Columns that share one scale."""

    def group_scales(self) -> tuple[Float[Array, "... out groups"], Float[Array, "... out groups"] | None]:
        """Scales and minimums, computed once a group.

        XLA:CPU would fuse their unpacking into the loop over all weights and do it anew for each weight (6 times
        slower for Q4_K); nothing but a loop of its own keeps it out, so there is one, of two steps.
        """
        without_codes = self.replace(planes=())  # pyright: ignore[reportAttributeAccessIssue]
        leaves = jax.tree.leaves(without_codes)
        rows = leaves[0].shape[-2]
        if leaves[0].ndim != 2 or rows % 2:
            return self.scales(), self.minimums()
        halves = jax.tree.map(lambda leaf: leaf.reshape(2, rows // 2, -1), without_codes)
        return jax.tree.map(lambda values: values.reshape(rows, -1), _map_scales(halves))

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        codes, (scales, minimums) = self.codes(), self.group_scales()
        *lead, n = codes.shape
        grouped = codes.reshape(*lead, scales.shape[-1], -1).astype(jnp.float32)
        # At most 24 bits: the product is exact (or the one rounding), so a fused multiply-add changes nothing.
        w = scales[..., None] * grouped
        if minimums is not None:
            w = w + minimums[..., None]
        return w.reshape(*lead, n).astype(dtype)
