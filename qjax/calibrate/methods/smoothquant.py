"""SmoothQuant of a block: scales folded into what comes before, then weights and activations rounded to nearest."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.calibrate.blocks import Block, Made
from qjax.calibrate.methods.pairs import Pair
from qjax.calibrate.methods.scaling import block_sums, pack_scaled, sample, scale
from qjax.errors import QjaxError
from qjax.quantizers.rtn import rtn
from qjax.quantizers.smoothquant import ALPHAS, search_alpha, smooth_scale


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Activations made easier to round, at the weights' expense (Xiao et al. 2023); for schemes such as w8a8.

    alpha: how much of it; None searches one for each input, no scaling included, by the error of the products.
    fold: scales are divided out of the norms, of the values' rows and of ffn_up's; else packed matrices divide their
      inputs themselves, at run time, and nothing else in the block changes.
    """

    alpha: float | None = 0.5
    fold: bool = True
    needs_inputs = True
    needs_float = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise QjaxError(f"expected an alpha from 0 to 1, got {self.alpha}")

    def __call__(self, block: Block) -> Made:
        sums = block_sums(block)
        some = _sample(block) if self.alpha is None else {}

        def find(pair: Pair, ws: dict[str, Any], ties: Any) -> tuple[Any | None, str]:
            of, stacked = sums[pair.names], tuple(ws.values())
            if self.alpha is not None:
                w_most = jnp.stack([jnp.abs(w).max(0) for w in stacked]).max(0)
                return smooth_scale(of.most, w_most, self.alpha, ties), f"alpha {self.alpha:.2f}"
            schemes = tuple(block.schemes[name] for name in ws)
            best = search_alpha(stacked, schemes, of.most, some[pair.names], ties)
            chosen = int(best.candidate)
            return (None, "no scale") if chosen == 0 else (best.scale, f"alpha {ALPHAS[chosen - 1]:.2f}")

        found = scale(block, sums, find, folded=self.fold)
        return pack_scaled(block, sums, found, lambda name, w, second: rtn(w, block.schemes[name]))


def _keep(names: tuple[str, ...], x: Float[Array, "batch seq in"]) -> Float32[Array, "tokens in"]:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _sample(block: Block) -> dict[tuple[str, ...], Any]:
    """The inputs of its products for one batch of samples."""
    return block.run(block.weights, sample(block), _keep)[1]
