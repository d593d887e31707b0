"""The vector lattices of the IQ1, IQ2 and IQ3 types: small tables of points, and how to read them.

An index picks a point of 8 (IQ1, IQ2) or 4 (IQ3) coordinates. `gguf.quants` stores a table as one 16-bit word
a point, 2 bits (IQ1, IQ2) or 4 bits (IQ3) a coordinate, and maps each coordinate's code to a value. The words
are kept as they are, at most 4 KB a type: one gather fetches a whole point, and since the maps are nearly
linear, the values come from arithmetic instead of a second look-up.
"""

import functools
from collections.abc import Callable

import gguf.quants as constants
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8, UInt16, UInt32

from qjax.arrays.raw_bytes import fields, split_last

_GRIDS = {
    "IQ1_S": constants.IQ1_S,
    "IQ1_M": constants.IQ1_M,
    "IQ2_XXS": constants.IQ2_XXS,
    "IQ2_XS": constants.IQ2_XS,
    "IQ2_S": constants.IQ2_S,
    "IQ3_XXS": constants.IQ3_XXS,
    "IQ3_S": constants.IQ3_S,
}

# A coordinate's code -> its value, gguf's grid_map in closed form.
_VALUES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "IQ1": lambda code: code - 1,  # -1 0 1
    "IQ2": lambda code: 8 + 17 * code + (code >> 1),  # 8 25 43
    "IQ3_XXS": lambda code: 4 + 8 * code + 2 * ((code + 1) >> 3),  # 4 12 ... 52 62
    "IQ3_S": lambda code: 1 + 2 * code,  # 1 3 ... 15
}


@functools.cache
def point_words(type: str) -> np.ndarray:
    """The lattice of `type` as uint16[points], the first coordinate in the lowest bits."""
    grid_hex = _GRIDS[type].grid_hex
    if grid_hex is None:
        raise ValueError(f"expected a type with a lattice, one of {', '.join(_GRIDS)}; got {type}")
    return np.frombuffer(bytes.fromhex(grid_hex.decode("ascii")), dtype="<u2").astype(np.uint16)


def _look_up(type: str, index: jax.Array) -> jax.Array:
    # No index has more bits than its table has entries: nothing to clamp.
    return jnp.asarray(point_words(type)).at[index.astype(jnp.int32)].get(mode="promise_in_bounds")


def points_of_8(type: str, index: UInt8[Array, "*s n"] | UInt16[Array, "*s n"]) -> Int32[Array, "*s n 8"]:
    """Coordinates of the 8-dimensional points of IQ1 and IQ2 types."""
    codes = fields(_look_up(type, index), range(0, 16, 2), 3)
    return _VALUES[type[:3]](codes.astype(jnp.int32))


def points_of_4(type: str, index: UInt8[Array, "*s n"] | UInt16[Array, "*s n"]) -> Int32[Array, "*s n//2 8"]:
    """Coordinates of the 4-dimensional points of IQ3 types, two neighbours joined to a vector of 8."""
    words = split_last(_look_up(type, index), index.shape[-1] // 2, 2)
    pairs = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return _VALUES[type](fields(pairs, range(0, 32, 4), 7).astype(jnp.int32))


def with_parity(signs: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """8 sign bits from 7: the last makes the number of minus signs even (gguf's `ksigns` table)."""
    return signs | ((jax.lax.population_count(signs) & np.uint32(1)) << np.uint32(7))


def apply_signs(
    values: Int32[Array, "*s 8"], signs: UInt8[Array, "*s"] | UInt16[Array, "*s"] | UInt32[Array, "*s"]
) -> Int32[Array, "*s 8"]:
    """Negate coordinate i where bit i is set."""
    return jnp.where(fields(signs, range(8), 1) != 0, -values, values)
