"""Packing of codes into bit planes."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.arrays.planes import Plane, layout_bits, pack, pack_plane, unpack

WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@partial(jax.jit, static_argnums=1)
def there_and_back(codes: jax.Array, layout: tuple[Plane, ...]) -> Any:
    planes = pack(codes, layout)
    return planes, unpack(planes, layout)


@given(st.sampled_from(sorted(WIDTHS)), st.sampled_from([1, 4, 16, 32]), st.integers(0, 2**31))
def test_unpack_inverts_pack(bits: int, stride: int, seed: int) -> None:
    layout = tuple(Plane(width, stride) for width in WIDTHS[bits])
    assert layout_bits(layout) == bits
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, 512), dtype=np.uint8)
    planes = pack(codes, layout)
    assert sum(plane.nbytes for plane in planes) == codes.size * bits // 8, "no bit is wasted"
    np.testing.assert_array_equal(unpack(planes, layout), codes)
    on_device, back = there_and_back(codes, layout)
    for ours, theirs in zip(on_device, planes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(back, codes)


def test_stride_one_is_the_plain_order_of_bits() -> None:
    """numpy's packbits is the oracle of consecutive codes, lowest bit first."""
    bits = np.random.default_rng(0).integers(0, 2, (4, 64), dtype=np.uint8)
    np.testing.assert_array_equal(pack_plane(bits, Plane(1, 1)), np.packbits(bits, axis=-1, bitorder="little"))


def test_byte_of_a_nibble_plane() -> None:
    """ggml's Q4_0: byte j holds element j below and j + 16 above."""
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    packed = pack_plane(codes, Plane(4, 16))
    assert packed[0, 3] == 3 | (3 << 4)
    assert packed.shape == (1, 16)


def test_whole_chunks_only() -> None:
    with pytest.raises(ValueError, match="multiple of 32 codes, got 48"):
        pack_plane(np.zeros((1, 48), np.uint8), Plane(4, 16))
