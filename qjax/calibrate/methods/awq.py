"""AWQ of a block: a scale for the columns of each input, folded into what comes before, then clipped ranges."""

import dataclasses
from typing import Any

from qjax.calibrate.blocks import Block, Line, Weights
from qjax.calibrate.methods.pairs import Pair
from qjax.calibrate.methods.scaling import block_moments, scale_and_pack
from qjax.errors import QjaxError
from qjax.quantizers.awq import MAX_SHRINK, N_GRID, awq, range_shares, search_scale


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Activation-aware weight quantization (Lin et al. 2024; see `qjax.quantizers.awq`).

    clip: search how much of each group's range to keep, from all down to 1 - max_shrink; else round to nearest.
    duo_scaling: scales by activations and weights, else by activations alone.
    n_grid: how many ratios, and steps of the whole range, are tried.
    fold: scales are divided out of the norms, of the values' rows and of ffn_up's; else packed matrices divide their
      inputs themselves, at run time, and nothing else in the block changes.

    The error that scales are chosen by is that of the products themselves. The paper's, of the attention's and of the
    SwiGLU's output, takes a pass over the text for each ratio.
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

    def __call__(self, block: Block) -> tuple[Weights, list[Line]]:
        moments = block_moments(block)
        shares = range_shares(self.n_grid, self.max_shrink) if self.clip else ()

        def find(pair: Pair, ws: dict[str, Any], ties: Any) -> tuple[Any | None, str]:
            of = moments[pair.names]
            found = search_scale(
                tuple(ws.values()),
                tuple(block.schemes[name] for name in ws),
                of.absolute / of.tokens,
                of.second,
                ties,
                n_grid=self.n_grid,
                duo_scaling=self.duo_scaling,
            )
            chosen = int(found.candidate)
            if chosen == 0:
                return None, "no scale"
            gain = float(found.errors[chosen] / found.errors[0])
            return found.scale, f"ratio {(chosen - 1) / self.n_grid:.2f}, error x {gain:.3f}"

        pack = lambda w, scheme, second: awq(w, second, scheme, shares)
        return scale_and_pack(block, moments, find, pack, folded=self.fold)
