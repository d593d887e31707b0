"""Round to nearest, matrix by matrix: no calibration."""

import dataclasses
import time

import jax.numpy as jnp

from qjax.calibrate.blocks import Block, Line, Made
from qjax.calibrate.methods.packed import lost, with_activations
from qjax.quantizers.rtn import rtn


@dataclasses.dataclass(frozen=True)
class RTN:
    """Each weight to the nearest point of its group's grid; mse: see `quantizers.rtn.rtn`."""

    mse: bool = False

    @property
    def needs_inputs(self) -> bool:
        return False

    @property
    def needs_float(self) -> bool:
        return False

    def __call__(self, block: Block) -> Made:
        weights, lines = dict(block.weights), []
        for name, scheme in block.schemes.items():
            start = time.perf_counter()
            w = jnp.asarray(block.weights[name])
            array = rtn(w, scheme, mse=self.mse)
            error = float(lost(array, w))
            weights[name] = with_activations(array, scheme)
            lines.append(Line(block.index, name, str(scheme), error, None, time.perf_counter() - start))
        return Made(weights, lines)
