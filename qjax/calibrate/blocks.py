"""A model block by block over calibration text: hidden states wait in host memory, one block is on the device.

A quantizing method is given each block in turn, with the hidden states that come out of the quantized blocks before
it, and gives back the block's weights, packed.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from qjax.arrays.scheme import Scheme
from qjax.kernels import rope_angles
from qjax.models import ModelConfig
from qjax.models.forward import Tap, Tapped, embed, layer

Weights = dict[str, Any]
Hidden = Float32[np.ndarray, "samples seq hidden"]


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
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    angles = rope_angles(positions, rope)
    y, _, tapped = layer(weights, x, angles, positions, None, config=config, tap=tap)
    return y, tapped


@dataclasses.dataclass(frozen=True)
class Block:
    """One decoder layer and what goes into it.

    index: from 0. weights: of `models.forward.layer`, float (any float dtype) matrices. schemes: of those matrices that
    are to be quantized, by their names ("attn_q"). inputs: float32 hidden states on the host, out of the quantized
    blocks before. float_inputs: out of the float blocks before, None unless the method asks for them. batch: samples
    that are run at once.
    """

    index: int
    weights: Weights
    schemes: Mapping[str, Scheme]
    config: ModelConfig
    rope: Any
    inputs: Hidden
    float_inputs: Hidden | None = None
    batch: int = 8

    def batches(self, hidden: Hidden) -> Iterator[Any]:
        """Of hidden states [samples, seq, hidden], in order; the last may be smaller."""
        for start in range(0, len(hidden), self.batch):
            yield jnp.asarray(hidden[start : start + self.batch])

    def run(self, weights: Weights, x: Any, tap: Tap | None = None) -> tuple[Any, Tapped]:
        """The block's output for one batch, and what `tap` keeps of the products' inputs; pure in weights and x."""
        return run_block(weights, x, self.rope, self.config, tap)

    def outputs(self, weights: Weights, hidden: Hidden) -> Hidden:
        """The block's output for all hidden states, on the host."""
        return np.concatenate([np.asarray(self.run(weights, x)[0]) for x in self.batches(hidden)])

    def name_of(self, name: str) -> str:
        """GGUF's name of one of its weights."""
        return f"blk.{self.index}.{name}.weight"


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

    def __call__(self, block: Block) -> tuple[Weights, list[Line]]:
        """The block's weights with packed arrays for those of `block.schemes`, and a line for each of these.

        Norms and biases may be other ones too, where a scale was folded into them. Deterministic: the same block gives
        the same bits.
        """
        ...


Progress = Callable[[str], None]


def begin_blocks(token_embd: Any, tokens: Int32[np.ndarray, "samples seq"], batch: int = 8) -> Hidden:
    """The hidden states that go into the first block, on the host."""
    parts = range(0, len(tokens), batch)
    made = (embed({"token_embd": token_embd}, jnp.asarray(tokens[i : i + batch])) for i in parts)
    return np.concatenate([np.asarray(x) for x in jax.device_get(list(made))])
