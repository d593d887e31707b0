"""GPTQ, input by input: second moments of what goes into a block's matrices, then each matrix rounded for these."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.arrays import QuantizedArray, Scheme
from qjax.arrays.scheme import TENSOR
from qjax.calibrate.blocks import HALVES, Block, Half, Line, Made, Weights
from qjax.calibrate.methods.packed import lost, with_activations
from qjax.errors import QjaxError
from qjax.kernels import rms_norm
from qjax.quantizers import hessian
from qjax.quantizers.asymmetric import compensated, trusted_share
from qjax.quantizers.gptq import gptq
from qjax.quantizers.hessian import Moments

# Matrices that share an input, in the order of the computation: of each half the first ones are given the normed
# residual stream, and the products of the last one are added to it.
STEPS: dict[Half, tuple[tuple[str, ...], ...]] = {
    "attn": (("attn_q", "attn_k", "attn_v"), ("attn_output",)),
    "ffn": (("ffn_gate", "ffn_up"), ("ffn_down",)),
}
_TO_STREAM = tuple(names[0] for _, names in STEPS.values())
_Rounded = tuple[QuantizedArray, Line]


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Frantar et al. 2023; see `quantizers.gptq`. With asymmetric=False, mse=False it is its authors' algorithm.

    block_size, damp, act_order, static_groups, mse: see `quantizers.gptq.gptq`.
    true_sequential: inputs of later matrices are recomputed through the block's quantized earlier ones.
    asymmetric: aim at the float model's products and residual stream, not at those of the float weights with inputs
      that quantized layers gave (`quantizers.asymmetric`). The log's errors of weights are to the float weights, those
      of products to what was aimed at.
    """

    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    block_size: int = 128
    true_sequential: bool = True
    asymmetric: bool = True
    mse: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 0 <= self.damp < math.inf:
            raise QjaxError(
                f"expected a block size from 1 on and damping from 0 on, got {self.block_size}, {self.damp}"
            )

    @property
    def needs_inputs(self) -> bool:
        return True

    @property
    def needs_float(self) -> bool:
        return self.asymmetric

    def __call__(self, block: Block) -> Made:
        walk = _Walk(block, self.asymmetric)
        weights, lines = dict(block.weights), []
        # What has been rounded so far is in `weights` at once.
        seen = weights if self.true_sequential else block.weights
        for half in HALVES:
            for names, moments in zip(STEPS[half], (walk.entering, walk.leaving), strict=True):
                wanted = [name for name in names if name in block.schemes]
                if wanted:
                    made = self._step(block, wanted, partial(moments, half, seen))
                    weights |= {name: array for name, (array, _) in made.items()}
                    lines += [line for _, line in made.values()]
            walk.past(half, seen)
        known = self.true_sequential and not block.last
        return Made(weights, lines, walk.stream if known else None, walk.true)

    def _step(self, block: Block, names: list[str], moments: Callable[[], Moments]) -> dict[str, _Rounded]:
        """Matrices of the same input rounded."""
        start, made = time.perf_counter(), {}
        found = moments()
        means = hessian.finish(found, block.name_of(names[0]))
        share = trusted_share(means[0].shape[0], int(found.count))
        for together in _alike(names, block.schemes):
            made |= self._rounded(block, together, *means, share)
        seconds = (time.perf_counter() - start) / len(names)
        return {name: (array, line._replace(seconds=seconds)) for name, (array, line) in made.items()}

    def _rounded(self, block: Block, names: list[str], H: Any, cross: Any, share: float) -> dict[str, _Rounded]:
        """Matrices of the same input and scheme, rounded as one: their rows do not know of each other."""
        scheme = block.schemes[names[0]]
        true = [jnp.asarray(block.weights[name]).astype(jnp.float32) for name in names]
        W = jnp.concatenate(true)
        if cross is not None:
            lack = cross if names[0] in _TO_STREAM else W @ cross
            W = compensated(W, H, lack, jnp.float32(share), damp=self.damp)
        array, damp = gptq(
            W,
            H,
            scheme,
            block_size=self.block_size,
            damp=self.damp,
            act_order=self.act_order,
            static_groups=self.static_groups,
            mse=self.mse,
        )
        raised = float(damp) > 1.01 * self.damp
        note = f"damping {float(damp):.3g}: with {self.damp:g} the Hessian was not positive definite" if raised else ""
        made, end = {}, 0
        for name, w in zip(names, true, strict=True):
            rows = slice(end, end := end + w.shape[0])
            part = array.map_rows(lambda leaf, rows=rows: leaf[rows])
            errors = float(lost(part, w)), float(lost(part, W[rows], H))
            line = Line(block.index, name, str(scheme), *errors, seconds=0.0, note=note)
            made[name] = with_activations(part, scheme), line
        return made


def _alike(names: list[str], schemes: Mapping[str, Scheme]) -> list[list[str]]:
    """Names by scheme; a matrix with one scale for all of it stays alone."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        scheme = schemes[name]
        groups.setdefault((scheme, name if scheme.group_size == TENSOR else None), []).append(name)
    return list(groups.values())


class _Walk:
    """The residual stream through a block, half by half: of the quantized model, and beside it of the float model."""

    def __init__(self, block: Block, asymmetric: bool) -> None:
        self.block, self.stream = block, block.inputs.copy()
        self.true = block.float_inputs.copy() if asymmetric and block.float_inputs is not None else None

    def _begun(self, name: str) -> Moments:
        """Of no tokens yet: of what the matrix is given, and of what the residual stream lacks."""
        return hessian.begin(self.block.weights[name].shape[1], None if self.true is None else self.stream.shape[-1])

    def entering(self, half: Half, weights: Weights) -> Moments:
        """Of what the half's first matrices are given, and of what it lacks of the float model's."""
        normed = lambda x: _normed(x, weights[f"{half}_norm"], eps=self.block.config.norm_eps)
        moments = self._begun(STEPS[half][0][0])
        for at in self.block.slices(self.stream):
            x = normed(self.stream[at])
            moments = hessian.add(moments, x, None if self.true is None else normed(self.true[at]) - x)
        return moments

    def leaving(self, half: Half, weights: Weights) -> Moments:
        """Of what the half's last matrix is given, and of what the stream behind it lacks of the float model's.

        The float model's stream is past the half then.
        """
        moments = self._begun(STEPS[half][-1][0])
        for at in self.block.slices(self.stream):
            x, y = self.block.run_half(half, weights, jnp.asarray(self.stream[at]))
            lack = None
            if self.true is not None:
                true = self.block.run_half(half, self.block.weights, jnp.array(self.true[at]))[1]
                self.true[at] = np.asarray(true)
                lack = true - y
            moments = hessian.add(moments, x, lack)
        return moments

    def past(self, half: Half, weights: Weights) -> None:
        """On, behind these weights of a half; `leaving` took the float model's stream there, if it was asked for."""
        if not (self.block.last and half == HALVES[-1]):
            self.block.advance(weights, self.stream, self.stream, (half,))
        if self.true is not None and STEPS[half][-1][0] not in self.block.schemes:
            self.block.advance(self.block.weights, self.true, self.true, (half,))


_normed = jax.jit(rms_norm, static_argnames="eps")
