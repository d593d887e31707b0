"""AWQ of a block: a scale for the columns of each input, folded into what comes before, then clipped ranges."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax.calibrate.blocks import Block, Made
from qjax.calibrate.methods.pairs import PAIRS, Pair
from qjax.calibrate.methods.scaling import Scaled, block_sums, pack_scaled, sample, scale
from qjax.errors import QjaxError
from qjax.quantizers.awq import MAX_SHRINK, N_GRID, awq, range_shares, search_scale
from qjax.quantizers.input_sums import InputSums, scaled


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Activation-aware weight quantization (Lin et al. 2024; see `qjax.quantizers.awq`).

    clip: search how much of each group's range to keep, from all down to 1 - max_shrink; else round to nearest.
    duo_scaling: scales by activations and weights, else by activations alone.
    n_grid: how many ratios, and steps of the whole range, are tried.
    fold: scales are divided out of the norms, of the values' rows and of ffn_up's; else packed matrices divide their
      inputs themselves, at run time, and nothing else in the block changes.

    The error that scales are chosen by is that of the products themselves: the paper's, of the attention's and of the
    SwiGLU's output, takes a pass over the text for each ratio, and divergences were the same within their noise.
    Whether queries and keys are clipped, which the reference never does, the block's output decides.
    """

    clip: bool = True
    duo_scaling: bool = True
    n_grid: int = N_GRID
    max_shrink: float | int = MAX_SHRINK
    fold: bool = True
    needs_inputs = True
    needs_float = False

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise QjaxError(f"expected a grid of at least one ratio, got {self.n_grid}")
        if not 0 <= self.max_shrink < 1:
            raise QjaxError(f"expected ranges to shrink by 0 to less than 1, got {self.max_shrink}")

    def __call__(self, block: Block) -> Made:
        sums = block_sums(block)
        shares = range_shares(self.n_grid, self.max_shrink) if self.clip else ()

        def find(pair: Pair, ws: dict[str, Any], ties: Any) -> tuple[Any | None, str]:
            of = sums[pair.names]
            best = search_scale(
                tuple(ws.values()),
                tuple(block.schemes[name] for name in ws),
                of.absolute / of.tokens,
                of.second,
                ties,
                n_grid=self.n_grid,
                duo_scaling=self.duo_scaling,
            )
            chosen = int(best.candidate)
            if chosen == 0:
                return None, "no scale"
            gain = float(best.errors[chosen] / best.errors[0])
            return best.scale, f"ratio {(chosen - 1) / self.n_grid:.2f}, error x {gain:.3f}"

        found = scale(block, sums, find, folded=self.fold)
        whole = _unclipped(block, sums, found, shares)
        clip = lambda name: () if name in whole else shares
        return pack_scaled(block, sums, found, lambda name, w, second: awq(w, second, block.schemes[name], clip(name)))


def _unclipped(
    block: Block, sums: dict[tuple[str, ...], InputSums], found: Scaled, shares: tuple[float, ...]
) -> tuple[str, ...]:
    """Queries' and keys' matrices, if the block's output is nearer to what it was with all of their ranges.

    What they are multiplied to goes through a softmax: the error of their products does not tell. At 2 bits clipping
    lowers that and can double the output's.
    """
    names = tuple(name for name in ("attn_q", "attn_k") if name in block.schemes)
    if not names or not shares:
        return ()
    x = sample(block)
    true = block.run(block.weights, x)[0]

    def error(shares: tuple[float, ...]) -> float:
        made = dict(block.weights)
        for name in names:
            s, w = found.columns[name], jnp.asarray(found.weights[name]).astype(jnp.float32)
            second = scaled(sums[PAIRS[0].names].second, s)
            made[name] = awq(w, second, block.schemes[name], shares).dequantize() / s[None]
        return float(jnp.sum(jnp.square(block.run(made, x)[0] - true)))

    return names if error(()) <= error(shares) else ()
