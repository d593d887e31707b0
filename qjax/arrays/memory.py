"""Memory accounting: bytes that a tree of weights takes packed, and would take as floats."""

from typing import Any, NamedTuple

import jax

from qjax.arrays.base import QuantizedArray


class Memory(NamedTuple):
    """Cost of one weight or of a whole tree.

    nbytes: bytes held, scales included; dequantized_nbytes: bytes of the same weights as 16-bit floats;
    parameters: how many weights.
    """

    nbytes: int
    dequantized_nbytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller than 16-bit floats."""
        return self.dequantized_nbytes / self.nbytes if self.nbytes else 1.0

    def __add__(self, other: tuple) -> "Memory":
        return Memory(*(a + b for a, b in zip(self, other, strict=True)))


def is_weight(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


def memory(tree: Any) -> Memory:
    """Sum over a tree of packed and float arrays; an array that occurs twice (tied embeddings) counts once."""
    total, seen = Memory(0, 0, 0), set()
    for leaf in jax.tree.leaves(tree, is_leaf=is_weight):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        total += Memory(leaf.nbytes, 2 * leaf.size, leaf.size)
    return total
