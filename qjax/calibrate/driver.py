"""A float model to a quantized one, block by block: one float block beside what is packed already.

Each block's inputs are recomputed through the quantized blocks before it, and wait on the host meanwhile. What is done
can be kept in `Checkpoints`: a run that was killed reads it, recomputes the hidden states and ends with the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from qjax.arrays import QuantizedArray, Scheme
from qjax.calibrate.blocks import Block, Hidden, Line, Made, Method, Weights, begin_blocks
from qjax.calibrate.checkpoints import Checkpoints
from qjax.calibrate.methods.rtn import RTN
from qjax.errors import QjaxError
from qjax.formats.source import Source
from qjax.models import ModelConfig
from qjax.models.load import (
    MATRICES,
    TOP,
    LayOut,
    Place,
    checked_config,
    keep,
    layer_tensor,
    layer_tensors,
    placed,
    read_array,
    read_ends,
    warn_kept,
)

Progress = Callable[[int, int, str], None]
Log = Callable[[Sequence[Line]], None]
_NO_HIDDEN = np.zeros((0, 1, 1), np.float32)
_NAMES = {key: name for name, key in TOP.items()}


@dataclasses.dataclass(frozen=True)
class FloatModel:
    """A model whose blocks are read one at a time.

    ends: the params outside of the layers. read: the weights of layer i; leaves are numpy's or JAX's. release: told the
    name of each tensor that is not needed any more.
    """

    config: ModelConfig
    ends: dict[str, Any]
    read: Callable[[int], Weights]
    release: Callable[[str], None] = lambda name: None


def model_in(source: Source) -> FloatModel:
    """The model of an open file or folder.

    Raises:
      UnsupportedError, FormatError: see `checked_config`.
    """
    config = checked_config(source)
    read = functools.partial(read_array, source)
    layer = lambda i: {key: read(name) for key, name in layer_tensors(source, config, i).items()}
    return FloatModel(config, read_ends(source, config, read), layer, source.release)


def model_of(params: dict[str, Any], config: ModelConfig) -> FloatModel:
    """The model of params that are in memory."""
    ends = {key: value for key, value in params.items() if key != "layers"}
    return FloatModel(config, ends, lambda i: params["layers"][i])


class Quantized(NamedTuple):
    """params: as `models.forward` takes them. lines: what was lost of each matrix, in order. resumed: blocks that were
    found done."""

    params: dict[str, Any]
    lines: list[Line]
    resumed: int


def quantize_blocks(
    model: FloatModel,
    method: Method,
    schemes: Mapping[str, Scheme],
    tokens: Int32[np.ndarray, "samples seq"] | None = None,
    *,
    batch: int = 8,
    checkpoints: Checkpoints | None = None,
    lay_out: LayOut = keep,
    place: Place = keep,
    progress: Progress = lambda done, total, note: None,
    log: Log = lambda lines: None,
) -> Quantized:
    """Every matrix that has a scheme packed by the method, the embedding and the output matrix to nearest.

    Args:
      schemes: of matrices, by their GGUF names; what has none is passed through. One that is packed already stays so,
        with a warning.
      tokens: calibration samples, each from position 0 on; None for a method that looks at none.
      batch: samples that are run at once; changes the last bits of sums.
      checkpoints: where finished blocks are kept, and looked for.
      lay_out, place: see `load_gguf`; what they give is in the params, not in the checkpoints.
      progress: told blocks done, blocks in all, and what is done now.
      log: told what was lost of each matrix, in order: first of all that is done at the start, then of each block once
        it is kept.

    Raises:
      QjaxError: no tokens for a method that wants some, weights or hidden states that are not finite, or a checkpoint
        is damaged or cannot be written.
    """
    config = model.config
    if method.needs_inputs and tokens is None:
        raise QjaxError(f"{type(method).__name__} looks at what goes into each matrix: give calibration data")
    done = checkpoints.count(config.layers) if checkpoints is not None else 0
    progress(0, config.layers, "")
    ends, lines = _rounded_ends(model, schemes)
    restored = [] if checkpoints is None else [line for i in range(done) for line in checkpoints.lines(i)]
    log([*lines, *restored])
    blocks = _Blocks(model, method, schemes, ends["token_embd"], tokens if method.needs_inputs else None, batch)
    params = {key: value for key, value in ends.items() if key not in _NAMES}
    params["rope"] = placed(place, "rope", params["rope"])
    for key in [key for key in _NAMES if key in ends]:
        # Of an embedding only rows are looked up, unless it is the output's matrix too.
        looked_up = key == "token_embd" and "output" in model.ends
        params[key] = _placed(model, _NAMES[key], ends.pop(key), keep if looked_up else lay_out, place)
    layers = []
    for i in range(config.layers):
        found = checkpoints.read(i) if checkpoints is not None and i < done else None
        # Past the last block that is still to do nobody wants hidden states.
        weights, of_block = blocks.next(i, found, last=i + 1 == config.layers or done == config.layers)
        if found is None:
            if checkpoints is not None:
                checkpoints.write(i, weights, of_block)
            log(of_block)
        lines += of_block
        layers.append(
            {key: _placed(model, layer_tensor(i, key), weights.pop(key), lay_out, place) for key in list(weights)}
        )
        progress(i + 1, config.layers, "" if found is None else "found done")
    return Quantized(params | {"layers": layers}, lines, done)


class _Blocks:
    """The blocks in their order, and the hidden states between them."""

    def __init__(
        self,
        model: FloatModel,
        method: Method,
        schemes: Mapping[str, Scheme],
        token_embd: Any,
        tokens: Int32[np.ndarray, "samples seq"] | None,
        batch: int,
    ) -> None:
        self.model, self.method, self.schemes, self.batch = model, method, schemes, batch
        self.hidden = _NO_HIDDEN if tokens is None else begin_blocks(_on_device(token_embd), tokens, batch)
        self.float_hidden = None
        if tokens is not None and method.needs_float:
            self.float_hidden = begin_blocks(_on_device(model.ends["token_embd"]), tokens, batch)
        self.rope = jnp.asarray(model.ends["rope"])

    def next(self, i: int, found: tuple[Weights, list[Line]] | None, *, last: bool) -> tuple[Weights, list[Line]]:
        """Block i packed, or as it was found; unless it is the last, the hidden states go through it."""
        config = self.model.config
        read = found is None or (self.float_hidden is not None and not last)
        floats = _on_device(self.model.read(i)) if read else {}
        schemes = {name: s for name in MATRICES if (s := self.schemes.get(f"blk.{i}.{name}.weight")) is not None}
        for name in [name for name in schemes if isinstance(floats.get(name), QuantizedArray)]:
            warn_kept(f"blk.{i}.{name}.weight", f"{floats[name].bits_per_weight:.3g}-bit")
            del schemes[name]
        block = Block(i, floats, schemes, config, self.rope, self.hidden, self.float_hidden, self.batch, last)
        made = Made(dict(floats), []) if found is None else Made(*found)
        if found is None and schemes:
            for name in schemes:
                _check_finite(block.name_of(name), floats[name])
            made = _run(self.method, block)
        if not last:
            self.hidden = _behind(block, made.weights, self.hidden, made.outputs)
            if self.float_hidden is not None:
                self.float_hidden = _behind(block, floats, self.float_hidden, made.float_outputs)
        return made.weights, made.lines


def _behind(block: Block, weights: Weights, hidden: Hidden, known: Hidden | None) -> Hidden:
    """What comes out of a block, in place of what went in unless it is known: there may be no room for two of them."""
    if known is None:
        block.advance(weights, hidden, hidden)
        known = hidden
    if not np.isfinite(known[:, -1]).all():
        raise QjaxError(f"hidden states behind block {block.index} are not finite: its weights are damaged")
    return known


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _run(method: Method, block: Block) -> Made:
    """What the method makes, with GGUF's names in the lines."""
    made = method(block)
    return made._replace(lines=[line._replace(name=block.name_of(line.name)) for line in made.lines])


def _check_finite(name: str, w: Any) -> None:
    if not bool(jnp.isfinite(w).all()):
        raise QjaxError(f"{name}: holds numbers that are not finite: the file is damaged")


def _placed(model: FloatModel, name: str, array: Any, lay_out: LayOut, place: Place) -> Any:
    if array.ndim == 2:
        array = lay_out(name, array)
    array = placed(place, name, array)
    model.release(name)
    return array


def _rounded_ends(model: FloatModel, schemes: Mapping[str, Scheme]) -> tuple[dict[str, Any], list[Line]]:
    """The params outside of the layers, those with a scheme rounded to nearest."""
    ends, lines = dict(model.ends), []
    for key, name in _NAMES.items():
        if name not in schemes or key not in ends:
            continue
        if isinstance(ends[key], QuantizedArray):
            warn_kept(name, f"{ends[key].bits_per_weight:.3g}-bit")
            continue
        alone = Block(-1, {key: jnp.asarray(ends[key])}, {key: schemes[name]}, model.config, None, _NO_HIDDEN)
        _check_finite(name, alone.weights[key])
        made = RTN()(alone)
        ends[key], lines = made.weights[key], [*lines, made.lines[0]._replace(name=name)]
    return ends, lines
