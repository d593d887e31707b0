"""The memory layout that this machine's kernels want for a weight, chosen once at load."""

from typing import Any

import jax
import numpy as np

from qjax.arrays import TransformedArray, serves_lanes, to_lanes
from qjax.arrays.planes import Plane
from qjax.kernels import native


def lay_out(name: str, array: Any, platform: str | None = None) -> Any:
    """The array in lanes where the CPU kernels will run and lanes serve it, else as it is. The name does not matter.

    `platform` is that of the device which will multiply with it; None for JAX's default.
    """
    if isinstance(array, TransformedArray):
        inner = lay_out(name, array.inner, platform)
        return array.replace(inner=inner)  # pyright: ignore[reportAttributeAccessIssue]
    if (
        (platform or jax.default_backend()) == "cpu"
        and serves_lanes(array) is None
        and native.knows(array)
        and native.available()
    ):
        return to_lanes(array, _repack, native.empty)
    return array


def _repack(data: np.ndarray, plane: Plane, columns: int, flip: int) -> np.ndarray:
    return native.repack(data, plane.width, plane.stride, columns, flip)
