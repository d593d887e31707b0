"""Round to nearest, matrix by matrix: no calibration."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.arrays import QuantizedArray, Scheme, TransformedArray
from qjax.calibrate.blocks import Block, Line, Weights
from qjax.quantizers.rtn import rtn


@dataclasses.dataclass(frozen=True)
class RTN:
    """Each weight to the nearest point of its group's grid."""

    @property
    def needs_inputs(self) -> bool:
        return False

    @property
    def needs_float(self) -> bool:
        return False

    def __call__(self, block: Block) -> tuple[Weights, list[Line]]:
        weights, lines = dict(block.weights), []
        for name, scheme in block.schemes.items():
            start = time.perf_counter()
            weights[name] = _packed(block.weights[name], scheme)
            error = float(_error(block.weights[name], weights[name]))
            lines.append(Line(block.index, name, str(scheme), error, None, time.perf_counter() - start))
        return weights, lines


def _packed(w: Any, scheme: Scheme) -> QuantizedArray:
    array = rtn(jnp.asarray(w), scheme)
    return TransformedArray(array, rounding="int8") if scheme.activations == "int8" else array


@jax.jit
def _error(w: Float[Array, "out in"], made: Any) -> Float32[Array, ""]:
    w = w.astype(jnp.float32)
    return jnp.square(made.dequantize() - w).sum() / jnp.maximum(jnp.square(w).sum(), jnp.float32(1e-30))
