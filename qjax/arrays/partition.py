"""Packed weights cut over a device mesh.

A weight may be cut along out_features (each device computes some of the outputs) or along in_features on group
borders (each device computes a summand of all outputs). A `Partitioned` weight remembers the mesh and the axis, so
that `qmatmul` can wrap its kernel in a `shard_map`: under plain jit the compiler would gather a weight to feed it to
a kernel that it cannot split.
"""

from typing import Any, Literal

import jax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.arrays.base import QuantizedArray
from qjax.arrays.lanes import LANES, LaneBlockedArray

Side = Literal["out", "in"]


@struct.dataclass(repr=False)
class Partitioned:
    """A packed weight laid out over `mesh`, cut along `axis` of it on the given side.

    Leaves: those of `weight`, each with a NamedSharding. Static: mesh, axis, side.
    """

    weight: Any
    mesh: Mesh = struct.field(pytree_node=False)
    axis: str = struct.field(pytree_node=False)
    side: Side = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def size(self) -> int:
        return self.weight.size

    @property
    def spec(self) -> PartitionSpec:
        """Of every leaf [out, bytes or groups of a row]."""
        return PartitionSpec(self.axis, None) if self.side == "out" else PartitionSpec(None, self.axis)

    def __repr__(self) -> str:
        return f"Partitioned({self.weight!r}, {self.side}_features over {self.axis!r})"


def _cuttable(weight: LaneBlockedArray, parts: int, side: Side) -> bool:
    """Whether equal parts of each leaf are lane-blocked arrays themselves, with the same static fields."""
    leaves = jax.tree.leaves(weight)
    if side == "out":
        return weight.padding == 0 and leaves[0].shape[0] % parts == 0
    return (
        weight.columns_padding == 0
        and weight.shape[1] % (parts * weight.column_unit) == 0
        # The 16 lanes of a number stay together.
        and all(leaf.shape[1] % (parts * LANES) == 0 for leaf in leaves)
    )


def why_whole(weight: Any, parts: int, axis: str) -> str | None:
    """Why columns of a weight, its rows side by side, cannot be cut over an axis of so many devices; None: they can."""
    columns, unit = weight.shape[1], weight.column_unit if isinstance(weight, QuantizedArray) else 1
    if columns % (parts * unit):
        return (
            f"cannot cut {columns} columns into {parts} equal parts on borders of {unit} "
            f"(mesh axis {axis!r}): cut along out_features, or use fewer devices"
        )
    if any(leaf.shape[-1] % parts for leaf in jax.tree.leaves(weight)):
        return f"a scale is shared by all columns of {weight!r}: cut along out_features"
    return None


def partition(weight: Any, mesh: Mesh, axis: str, side: Side = "out") -> Partitioned:
    """Cut a 2-D packed or float weight over one axis of a mesh and put its parts there.

    A lane-blocked weight stays so where the cut falls between its tiles, or between its steps; else it becomes plain.

    Raises:
      ValueError: the axis' size does not divide the rows, or the columns on group borders.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a 2-D weight to partition, got shape {weight.shape}")
    parts = mesh.shape[axis]
    rows = weight.shape[0]
    if isinstance(weight, LaneBlockedArray) and not _cuttable(weight, parts, side):
        weight = weight.plain()
    if side == "out" and rows % parts:
        raise ValueError(f"cannot cut {rows} rows into {parts} equal parts over mesh axis {axis!r}")
    if side == "in" and (why := why_whole(weight, parts, axis)) is not None:
        raise ValueError(why)
    sharding = NamedSharding(mesh, Partitioned(weight, mesh, axis, side).spec)
    return Partitioned(jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), weight), mesh, axis, side)
