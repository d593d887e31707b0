"""GPTQ, input by input: second moments of what goes into a block's matrices, then each matrix rounded for these."""

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import partial
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp

from qjax.arrays import QuantizedArray, Scheme
from qjax.arrays.scheme import TENSOR
from qjax.calibrate.blocks import Block, Line, Weights, run_block
from qjax.calibrate.methods.packed import lost, with_activations
from qjax.errors import QjaxError
from qjax.kernels import qmatmul
from qjax.models import ModelConfig
from qjax.quantizers import hessian
from qjax.quantizers.asymmetric import compensated, trusted_share
from qjax.quantizers.gptq import gptq
from qjax.quantizers.hessian import Moments

# Matrices that share an input, in the order of the computation; and those whose products the residual stream is given.
STEPS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
_TO_STREAM = ("attn_output", "ffn_down")


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

    def __call__(self, block: Block) -> tuple[Weights, list[Line]]:
        weights, lines = dict(block.weights), []
        for step in STEPS:
            names = [name for name in step if name in block.schemes]
            if not names:
                continue
            start = time.perf_counter()
            before = weights if self.true_sequential else block.weights
            moments = _moments(block, before, step[0], self.asymmetric)
            found = hessian.finish(moments, block.name_of(names[0]))
            share = trusted_share(found[0].shape[0], int(moments.count))
            for together in _alike(names, block.schemes):
                made = self._rounded(block, together, *found, share)
                weights |= {name: array for name, (array, _) in made.items()}
                lines += [line for _, line in made.values()]
            seconds = (time.perf_counter() - start) / len(names)
            lines[-len(names) :] = [line._replace(seconds=seconds) for line in lines[-len(names) :]]
        return weights, lines

    def _rounded(
        self, block: Block, names: list[str], H: Any, cross: Any, share: float
    ) -> dict[str, tuple[QuantizedArray, Line]]:
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


def _moments(block: Block, weights: Weights, name: str, asymmetric: bool) -> Moments:
    """Of the input of a matrix in a block of these weights; with what it, or the stream behind it, lacks by then."""
    look = partial(_looked_up, rope=block.rope, config=block.config, name=name)
    moments = None
    others = block.batches(block.float_inputs) if asymmetric and block.float_inputs is not None else repeat(None)
    for x, true in zip(block.batches(block.inputs), others, strict=False):
        inputs, stream = look(weights, x)
        lack = None
        if true is not None:
            true_inputs, true_stream = look(block.weights, true)
            lack = true_stream - stream if name in _TO_STREAM else true_inputs - inputs
        if moments is None:
            moments = hessian.begin(inputs.shape[-1], None if lack is None else lack.shape[-1])
        moments = hessian.add(moments, inputs, lack)
    if moments is None:
        raise QjaxError(f"{block.name_of(name)}: no calibration tokens: GPTQ needs some")
    return moments


@partial(jax.jit, static_argnames=("config", "name"))
def _looked_up(weights: Weights, x: Any, *, rope: Any, config: ModelConfig, name: str) -> tuple[Any, Any]:
    """What a matrix is given, and the residual stream with its products; the compiler leaves out what is behind."""
    y, tapped = run_block(weights, x, rope, config, lambda names, inputs: inputs if name in names else None)
    inputs = next(inputs for inputs in tapped.values() if inputs is not None)
    if name == "attn_output":
        y = x + qmatmul(inputs, weights[name])
    return inputs, y if name in _TO_STREAM else None
