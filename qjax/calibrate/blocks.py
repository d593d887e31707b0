"""A model block by block over calibration text: hidden states wait in host memory, one block is on the device.

A quantizing method is given each block in turn, with the hidden states that come out of the quantized blocks before
it, and gives back the block's weights, packed.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from qjax.arrays.scheme import Scheme
from qjax.models import ModelConfig
from qjax.models.forward import Tap, Tapped, attention, embed, feed_forward, layer, project, turns

Weights = dict[str, Any]
Hidden = Float32[np.ndarray, "samples seq hidden"]
# Of a block, by what the names of their weights begin with: attention, and the feed-forward part.
Half = Literal["attn", "ffn"]
HALVES: tuple[Half, ...] = ("attn", "ffn")


class Line(NamedTuple):
    """What was lost of one matrix: for the log.

    weight_error: mean square of quantized less true weights over that of the weights; output_error: the same of the
    products with the calibration inputs (None where none were looked at); note: what else there is to say.
    """

    block: int
    name: str
    scheme: str
    weight_error: float
    output_error: float | None
    seconds: float
    note: str = ""


def run_block(weights: Weights, x: Any, rope: Any, config: ModelConfig, tap: Tap | None = None) -> tuple[Any, Tapped]:
    """`Block.run`, for programs that take the block apart."""
    y, _, tapped = layer(weights, x, *_turns(x, rope), None, config=config, tap=tap)
    return y, tapped


def _turns(x: Any, rope: Any) -> tuple[Any, Any]:
    return turns({"rope": rope}, x.shape[1], jnp.zeros(x.shape[0], jnp.int32))


@partial(jax.jit, static_argnames=("config", "half"))
def _run_half(weights: Weights, x: Any, rope: Any, *, config: ModelConfig, half: Half) -> tuple[Any, Any]:
    inputs = None

    def products(x: Any, *names: str) -> list[Any]:
        nonlocal inputs
        inputs = x
        return project(x, weights, names, "float")

    if half == "attn":
        y, _ = attention(weights, x, *_turns(x, rope), None, config=config, products=products)
    else:
        y = feed_forward(weights, x, config=config, products=products)
    return inputs, y


@dataclasses.dataclass(frozen=True)
class Block:
    """One decoder layer and what goes into it.

    index: from 0. weights: of `models.forward.layer`, float (any float dtype) matrices. schemes: of those matrices that
    are to be quantized, by their names ("attn_q"). inputs: float32 hidden states on the host, out of the quantized
    blocks before. float_inputs: out of the float blocks before, None unless the method asks for them. batch: samples
    that are run at once. last: nobody wants what comes out of it.
    """

    index: int
    weights: Weights
    schemes: Mapping[str, Scheme]
    config: ModelConfig
    rope: Any
    inputs: Hidden
    float_inputs: Hidden | None = None
    batch: int = 8
    last: bool = False

    def slices(self, hidden: Hidden) -> list[slice]:
        """Samples that are run at once, in order; the last may be fewer."""
        return [slice(start, start + self.batch) for start in range(0, len(hidden), self.batch)]

    def batches(self, hidden: Hidden) -> Iterator[Any]:
        """Of hidden states [samples, seq, hidden], by `slices`."""
        return (jnp.asarray(hidden[at]) for at in self.slices(hidden))

    def run(self, weights: Weights, x: Any, tap: Tap | None = None) -> tuple[Any, Tapped]:
        """The block's output for one batch, and what `tap` keeps of the products' inputs; pure in weights and x."""
        return run_block(weights, x, self.rope, self.config, tap)

    def run_half(self, half: Half, weights: Weights, x: Any) -> tuple[Any, Any]:
        """What the half's last matrix is given for one batch, and the residual stream behind the half."""
        mine = {name: array for name, array in weights.items() if name.startswith(half)}
        return _run_half(mine, x, self.rope, config=self.config, half=half)

    def outputs(self, weights: Weights, hidden: Hidden) -> Hidden:
        """The block's output for all hidden states, on the host: the same bits as of `run_half`, batch by batch."""
        made = np.empty_like(hidden)
        self.advance(weights, hidden, made)
        return made

    def advance(self, weights: Weights, hidden: Hidden, out: Hidden, halves: Sequence[Half] = HALVES) -> None:
        """`outputs` (or what comes out of some halves) into `out`, which may be `hidden`."""
        for at in self.slices(hidden):
            # A copy: `out` may be what a program still reads.
            x = jnp.array(hidden[at])
            for half in halves:
                _, x = self.run_half(half, weights, x)
            out[at] = np.asarray(x)

    def name_of(self, name: str) -> str:
        """GGUF's name of one of its weights."""
        return f"blk.{self.index}.{name}.weight"


class Made(NamedTuple):
    """What a method makes of a block.

    weights: with packed arrays for the matrices of `Block.schemes`; norms and biases may be other ones too, where a
    scale was folded into them. lines: one for each packed matrix. outputs, float_outputs: what `Block.outputs` gives of
    these weights and `inputs`, of the block's own and `float_inputs`, where the method has them anyway.
    """

    weights: Weights
    lines: list[Line]
    outputs: Hidden | None = None
    float_outputs: Hidden | None = None


@runtime_checkable
class Method(Protocol):
    """How a block is quantized.

    needs_float: whether `Block.float_inputs` is wanted. A method is a frozen dataclass of its options: its repr tells
    all that its result depends on, besides the block.
    """

    @property
    def needs_inputs(self) -> bool:
        """Whether it looks at any hidden states."""
        ...

    @property
    def needs_float(self) -> bool: ...

    def __call__(self, block: Block) -> Made:
        """Deterministic: the same block gives the same bits."""
        ...


Progress = Callable[[str], None]


def begin_blocks(token_embd: Any, tokens: Int32[np.ndarray, "samples seq"], batch: int = 8) -> Hidden:
    """The hidden states that go into the first block, on the host."""
    parts = range(0, len(tokens), batch)
    made = (embed({"token_embd": token_embd}, jnp.asarray(tokens[i : i + batch])) for i in parts)
    return np.concatenate([np.asarray(x) for x in jax.device_get(list(made))])
