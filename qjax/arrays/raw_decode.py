"""Types that are held as the file's own bytes: a registry of decoders, and `decode` over them.

They are those of GGUF's types that no packed family of `qjax.arrays` covers. Each decoder is pure JAX, gives
float32 bit for bit as `gguf.quants.dequantize` does (for Q1_0 as ggml does), and keeps the leading axes apart,
so that weights sharded by rows or by blocks stay so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
from jaxtyping import Array, Float32, UInt8

from qjax.arrays.raw_iq1 import decode_iq1_m, decode_iq1_s
from qjax.arrays.raw_iq2 import decode_iq2_s, decode_iq2_xs, decode_iq2_xxs
from qjax.arrays.raw_iq3 import decode_iq3_s, decode_iq3_xxs
from qjax.arrays.raw_small import decode_nvfp4, decode_q1_0, decode_tq1_0, decode_tq2_0


@dataclass(frozen=True)
class RawType:
    """Weights and bytes of a block, and the decoder uint8[..., block_bytes] -> float32[..., block_size]."""

    block_size: int
    block_bytes: int
    decode_blocks: Callable[[jax.Array], jax.Array]


decoders: Mapping[str, RawType] = MappingProxyType(
    {
        "IQ1_S": RawType(256, 50, decode_iq1_s),
        "IQ1_M": RawType(256, 56, decode_iq1_m),
        "IQ2_XXS": RawType(256, 66, decode_iq2_xxs),
        "IQ2_XS": RawType(256, 74, decode_iq2_xs),
        "IQ2_S": RawType(256, 82, decode_iq2_s),
        "IQ3_XXS": RawType(256, 98, decode_iq3_xxs),
        "IQ3_S": RawType(256, 110, decode_iq3_s),
        "TQ1_0": RawType(256, 54, decode_tq1_0),
        "TQ2_0": RawType(256, 66, decode_tq2_0),
        "NVFP4": RawType(64, 36, decode_nvfp4),
        "Q1_0": RawType(128, 18, decode_q1_0),
    }
)

# (weights, bytes) of a block of each type.
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {name: (entry.block_size, entry.block_bytes) for name, entry in decoders.items()}
)

# Decoders widen the blocks by two axes, and XLA on CPUs is unsound above rank 6.
_MAX_RANK = 4


def raw_type(type: str) -> RawType:
    """The entry of `type` in `decoders`; ValueError, listing them, where there is none."""
    if type not in decoders:
        raise ValueError(f"expected a type held as raw blocks, one of {', '.join(decoders)}; got {type!r}")
    return decoders[type]


def decode(type: str, blocks: UInt8[Array, "*rows n_blocks block_bytes"]) -> Float32[Array, "*rows n"]:
    """The weights in `blocks`, float32[*rows, n_blocks * block_size].

    Args:
      type: a key of `decoders`; static under jit.
      blocks: the file's bytes, the blocks of a row in order.

    Raises:
      ValueError: an unknown type, or blocks of another number of bytes.
    """
    entry = raw_type(type)
    if blocks.shape[-1] != entry.block_bytes:
        raise ValueError(f"expected {type} blocks of {entry.block_bytes} bytes, got shape {blocks.shape}")
    *rows, n_blocks, _ = blocks.shape
    if blocks.ndim > _MAX_RANK:
        blocks = blocks.reshape(-1, *blocks.shape[-3:])
    return entry.decode_blocks(blocks).reshape(*rows, n_blocks * entry.block_size)
