"""Raw blocks: a weight kept as the file's own bytes, for types that no kernel has earned a layout for yet."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from qjax.arrays.base import QuantizedArray
from qjax.arrays.raw_decode import BLOCKS, decode


@struct.dataclass(repr=False)
class RawBlockArray(QuantizedArray):
    """Blocks of a ggml type, decoded by `raw_decode.decode`.

    Leaves (arrays):
      blocks: uint8 [..., out, blocks a row * bytes a block].
      tensor_scale: float32 [..., out, 1] that multiplies every weight of its row (NVFP4's second level,
        the same number for all rows), or None.
    Static:
      type: ggml's name of the type, e.g. "IQ2_XXS".
    """

    blocks: Any
    tensor_scale: Any
    type: str = struct.field(pytree_node=False, default="IQ2_XXS")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, nbytes = self.blocks.shape
        size, block_bytes = BLOCKS[self.type]
        return (*lead, nbytes // block_bytes * size)

    @property
    def column_unit(self) -> int:
        return BLOCKS[self.type][0]

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        _, block_bytes = BLOCKS[self.type]
        *lead, nbytes = self.blocks.shape
        w = decode(self.type, self.blocks.reshape(*lead, nbytes // block_bytes, block_bytes))
        if self.tensor_scale is not None:
            w = w * self.tensor_scale
        return w.astype(dtype)

    def describe(self) -> str:
        return f"{self.type} blocks"
