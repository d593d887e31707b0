"""A tiny model whose matrices have one shape, and a method that looks at all that there is to look at."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.arrays import parse_scheme
from qjax.calibrate.blocks import Block, Line, Made
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.quantizers.rtn import rtn

W4 = parse_scheme("w4g32")
# Few programs to compile.
CONFIG = llama(layers=4, hidden=64, heads=2, kv_heads=2, ffn=64, vocab=320, context=64)
TOKENS = np.random.default_rng(0).integers(0, 320, (4, 16), np.int32)


def save_tiny(path: Path) -> Path:
    save_synthetic(path, Shape("tiny", CONFIG), "f16")
    return path


@dataclasses.dataclass(frozen=True)
class Looking:
    """To nearest, of weights scaled a little by all that a method may look at."""

    by: float = 1e-3
    needs_inputs: bool = True
    needs_float: bool = True

    def __call__(self, block: Block) -> Made:
        weights, lines = dict(block.weights), []
        assert block.float_inputs is not None
        seen = float(np.abs(block.inputs).mean() + np.square(block.inputs - block.float_inputs).mean())
        for name, scheme in block.schemes.items():
            w = weights[name].astype(jnp.float32)
            weights[name] = rtn(w * jnp.float32(1 + self.by * seen), scheme)
            lines.append(Line(block.index, name, str(scheme), seen, None, 0.0))
        # Norms may be other ones, too.
        weights["ffn_norm"] = weights["ffn_norm"] * jnp.float32(1 + self.by)
        return Made(weights, lines)
