"""The lane-blocked layout: to the bit what its specification says, and the same weight in every way of use."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from qjax.arrays import (
    AffineArray,
    LaneBlockedArray,
    Plane,
    QuantizedArray,
    codes_of,
    memory,
    partition,
    serves_lanes,
    to_lanes,
)
from qjax.arrays.planes import pack, unpack_plane
from qjax.formats.gguf import from_blocks, to_blocks, type_of
from qjax.formats.gguf.arrays import BLOCK_TYPES
from qjax.formats.gguf.types import GGML_TYPES

LAYOUTS = {
    2: (Plane(2, 4),),
    3: (Plane(2, 2), Plane(1, 2)),
    4: (Plane(4, 4),),
    5: (Plane(4, 8), Plane(1, 2)),
    6: (Plane(4, 1), Plane(2, 4)),
    8: (Plane(8, 1),),
}
KINDS = ("symmetric", "minimum", "zero", "minimum and zero")
FAMILIES = ["Q5_1", "Q8_0", "Q3_K", "Q4_K", "IQ4_XS", "MXFP4"]
NUMBERS = ("scale", "minimum", "zero", "super_scale", "super_minimum")


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    known = GGML_TYPES[kind]
    shape = (rows, columns // known.block_size * known.block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decoded(kind: str, raw: np.ndarray) -> np.ndarray:
    """What gguf-py makes of blocks."""
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, GGMLQuantizationType[kind])


def finite_blocks(kind: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks whose weights are numbers that a model could have, and these numbers."""
    raw, block = blocks(kind, rows, columns), GGML_TYPES[kind]
    good = (np.abs(decoded(kind, raw)) < 1e4).reshape(-1, block.block_size).all(axis=1)
    raw = np.where(good[:, None], raw.reshape(-1, block.block_bytes), np.uint8(0)).reshape(raw.shape)
    return raw, decoded(kind, raw)


def affine(bits: int, rows: int, columns: int, group: int | None, kind: str, seed: int = 0) -> AffineArray:
    """A random array with numpy leaves; group None is one scale a channel."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    groups = columns // (group or columns)
    scale = rng.standard_normal((rows, groups)).astype(np.float16 if seed % 2 else np.float32)
    minimum = rng.standard_normal((rows, groups)).astype(scale.dtype) if "minimum" in kind else None
    zero = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8) if "zero" in kind else None
    offset = 1 << (bits - 1) if kind == "symmetric" else 0
    return AffineArray(pack(codes, LAYOUTS[bits]), scale, minimum, LAYOUTS[bits], offset, zero=zero)


def assert_same(ours: QuantizedArray, theirs: QuantizedArray) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_floats(ours: jax.Array, theirs: np.ndarray) -> None:
    a, b = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a.view(np.uint32)[~np.isnan(a)], b.view(np.uint32)[~np.isnan(b)])


def by_definition(array: AffineArray) -> np.ndarray:
    """float32 scale * (code - offset - zero) + minimum; float16 scales beside a minimum, that no product is rounded."""
    assert array.minimum is None or array.scale.dtype == np.float16
    wide = lambda leaf: np.float32(0) if leaf is None else leaf.astype(np.float32)[..., None]
    codes = codes_of(array).astype(np.float32).reshape(*array.scale.shape, -1)
    w = wide(array.scale) * (codes - np.float32(array.offset) - wide(array.zero))
    return (w if array.minimum is None else w + wide(array.minimum)).reshape(array.shape)


@jax.jit
def used(lanes: QuantizedArray, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lanes.dequantize(), lanes.take(rows)


def check_use(array: QuantizedArray, floats: np.ndarray) -> None:
    """What an array in lanes is asked for is that of the plain one."""
    lanes = to_lanes(array)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((lanes, lanes.plain())))
    assert_same(lanes.plain(), array)
    rows = np.array([[array.shape[0] - 1, 0, 3], [1, 1, 2]], np.int32)
    for ours, theirs in zip(used(lanes, rows), (floats, floats[rows]), strict=True):
        assert_same_floats(ours, theirs)
    assert lanes.shape == array.shape
    assert lanes.group_size == array.group_size
    assert lanes.bits == array.bits
    assert lanes.describe() == array.describe() + ", in lanes"


def specified(array: AffineArray) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """Planes and numbers of the layout, byte for byte as the specification says them, from codes one at a time."""
    out, columns = array.shape
    unsigned = [np.asarray(unpack_plane(data, plane)) for data, plane in zip(array.planes, array.layout, strict=True)]
    if getattr(array, "bits", 0) == 8 and array.offset == 128:
        unsigned = [codes ^ np.uint8(0x80) for codes in unsigned]
    tiles, steps = math.ceil(out / 16), math.ceil(columns / 32)
    planes = []
    for codes, (w, _) in zip(unsigned, array.layout, strict=True):
        data = []
        for t in range(tiles):
            for s in range(steps):
                for v in range(w):
                    for at in range(64):
                        lane, c = divmod(at, 4)
                        byte = 0
                        for p in range(8 // w):
                            row, column = 16 * t + lane, 32 * s + 4 * (v + w * p) + c
                            if row < out and column < columns:
                                byte |= int(codes[row, column]) << (w * p)
                        data.append(byte)
        planes.append(data)
    numbers = {}
    for name in (*NUMBERS, "sub_scales"):
        leaf = getattr(array, name, None)
        if leaf is None:
            continue
        leaf = np.asarray(leaf)
        count = leaf.shape[1] + (array.group_size == 16 and columns % 32 != 0)
        lanes = np.zeros((tiles, count, 16), leaf.dtype)
        for row in range(out):
            for g in range(leaf.shape[1]):
                lanes[row // 16, g, row % 16] = leaf[row, g]
        numbers[name] = lanes.reshape(tiles, -1)
    return planes, numbers


def check_bits(array: QuantizedArray) -> None:
    """Only padding may differ: its codes are free."""
    assert isinstance(array, QuantizedArray)
    lanes = to_lanes(array)
    planes, numbers = specified(array)  # pyright: ignore[reportArgumentType]
    flip = getattr(array, "offset", 0) == 128
    for data, want, plane in zip(lanes.inner.planes, planes, lanes.inner.layout, strict=True):
        got = data.reshape(-1)
        if flip:  # codes of the padding are 0x80 then
            inside = np.asarray(specified_mask(array.shape), bool)
            got = np.where(inside, got, np.uint8(0))
        assert got.tolist() == want, plane
    for name, want in numbers.items():
        np.testing.assert_array_equal(getattr(lanes.inner, name).view(np.uint8), want.view(np.uint8))


def specified_mask(shape: tuple[int, ...]) -> list[bool]:
    """Which bytes of an 8-bit plane hold a code that is no padding."""
    out, columns = shape
    tiles, steps = math.ceil(out / 16), math.ceil(columns / 32)
    return [
        16 * t + at // 4 < out and 32 * s + 4 * v + at % 4 < columns
        for t in range(tiles)
        for s in range(steps)
        for v in range(8)
        for at in range(64)
    ]


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_block_type_in_lanes(kind: str) -> None:
    raw = blocks(kind, 40, 512)
    array = from_blocks(kind, raw, np.asarray)
    check_use(array, decoded(kind, raw))  # pyright: ignore[reportArgumentType]
    check_bits(from_blocks(kind, blocks(kind, 24, 256), np.asarray))  # pyright: ignore[reportArgumentType]


def grid() -> list[Any]:
    """Every width with every group and kind; by default a third of it, in which each two of these meet."""
    axes = sorted(LAYOUTS), (16, 32, 64, 128, None), KINDS[:3]
    return [
        pytest.param(bits, group, kind, k, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.slow)
        for (i, bits), (j, group), (k, kind) in itertools.product(*map(enumerate, axes))
    ]


@pytest.mark.parametrize(("bits", "group", "kind", "seed"), grid())
def test_every_affine_array_in_lanes(bits: int, group: int | None, kind: str, seed: int) -> None:
    array = affine(bits, 32 if seed else 19, 128 if group in (64, 128) else 96, group, kind, seed)
    assert serves_lanes(array) is None
    check_use(array, by_definition(array))


@given(
    bits=st.sampled_from(sorted(LAYOUTS)),
    rows=st.integers(1, 40),
    steps=st.integers(1, 8),
    group=st.sampled_from([16, 32, 48, 64, None]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_any_size_is_laid_out_as_specified_and_comes_back(
    bits: int, rows: int, steps: int, group: int | None, kind: str, seed: int
) -> None:
    columns = 16 * steps if group is None else group * steps
    array = affine(bits, rows, columns, group, kind, seed)
    if group == 48 and steps > 1:
        assert "groups of 48" in (serves_lanes(array) or "")
        return
    assert_same(to_lanes(array).plain(), array)
    check_bits(array)


SIZES = [(4, 17, 48, 16), (8, 5, 16, 16), (5, 30, 80, 16), (8, 33, 37, None), (2, 16, 16, None), (6, 4, 40, None)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_fill_no_tile_and_no_step(size: tuple[int, int, int, int | None], kind: str) -> None:
    bits, rows, columns, group = size
    layout = LAYOUTS[bits] if columns % 16 == 0 else (Plane(8, 1),) if bits == 8 else (Plane(4, 1), Plane(2, 1))
    rng = np.random.default_rng(columns)
    base = affine(bits, rows, 16, None, kind, seed=1)
    groups = columns // (group or columns)
    array = AffineArray(
        pack(rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8), layout),
        *(
            None if leaf is None else np.repeat(leaf, groups, axis=1) * np.arange(1, groups + 1, dtype=leaf.dtype)
            for leaf in (base.scale, base.minimum)
        ),
        layout,
        base.offset,
        zero=None if base.zero is None else np.repeat(base.zero, groups, axis=1),
    )
    lanes = to_lanes(array)
    assert (lanes.padding, lanes.columns_padding) == (-rows % 16, -columns % 32)
    assert lanes.inner.scale.shape == (
        math.ceil(rows / 16),
        16 * (groups + (columns % 32 == 16 and columns == 16 * groups)),
    )
    assert_same(lanes.plain(), array)
    check_bits(array)
    # What has to be compiled: each size and each kind, not each size with each kind.
    if SIZES.index(size) % len(KINDS) == KINDS.index(kind):
        check_use(array, by_definition(array))


def test_rows_are_clipped_as_in_the_plain_array() -> None:
    array = jax.tree.map(jnp.asarray, affine(4, 19, 64, 32, "zero"))
    rows = jnp.array([-1, 19, 31, 1000])
    np.testing.assert_array_equal(to_lanes(array).take(rows), array.take(rows))
    with pytest.raises(ValueError, match="expected a 2-D array"):
        jax.tree.map(lambda leaf: leaf[None], to_lanes(array)).take(rows)


def test_take_holds_the_wanted_rows_only() -> None:
    lanes = jax.tree.map(jnp.asarray, to_lanes(affine(4, 4096, 512, 32, "minimum")))
    compiled = jax.jit(lambda a: a.take(jnp.array([5, 4000]))).lower(lanes).compile()
    held = compiled.memory_analysis()
    assert held is not None
    assert held.temp_size_in_bytes < 1 << 16


@pytest.mark.parametrize("kind", FAMILIES)
def test_works_under_every_transformation(kind: str) -> None:
    raw, floats = finite_blocks(kind, 24, 512)
    array = to_lanes(from_blocks(kind, raw, np.asarray))  # pyright: ignore[reportArgumentType]
    stacked = jax.tree.map(lambda a: np.stack([a, a]), array)
    assert stacked.shape == (2, 24, 512)

    @jax.jit
    def everything(array: LaneBlockedArray, stacked: LaneBlockedArray, kept: QuantizedArray) -> Any:
        """One program: each of the ways is compiled into it."""
        mapped = jax.vmap(lambda a: a.dequantize())(stacked)
        _, scanned = jax.lax.scan(lambda c, a: (c, a.dequantize()), 0, stacked)
        both = stacked.dequantize(), mapped, scanned
        return array.dequantize(jnp.bfloat16), array.plain(), kept.dequantize(), both

    half, plain, rows, both = everything(array, stacked, array.map_rows(lambda leaf: leaf[3:5]))
    assert_same(plain, array.plain())
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, floats.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rows, floats[3:5])
    for pair in both:
        np.testing.assert_array_equal(pair[0], floats)
        np.testing.assert_array_equal(pair[1], floats)
    assert "LaneBlockedArray" in repr(jax.tree.map(lambda _: None, array))


def test_memory_counts_the_padding_too() -> None:
    array = to_lanes(affine(4, 24, 64, 32, "symmetric", seed=1))
    assert memory({"w": array, "tied": array}) == (32 * (32 + 4), 2 * 24 * 64, 24 * 64)
    assert (
        repr(array)
        == "LaneBlockedArray(24x64, 4-bit symmetric, groups of 32, float16 scales, in lanes, 6.00 bits/weight)"
    )


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("side", ["out", "in"])
def test_cut_between_tiles_and_between_steps(kind: str, side: str) -> None:
    raw, floats = finite_blocks(kind, 64, 1024)
    array = to_lanes(from_blocks(kind, raw, np.asarray))  # pyright: ignore[reportArgumentType]
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    cut = partition(array, mesh, "tp", side)
    assert isinstance(cut.weight, LaneBlockedArray)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(cut))
    shapes = []

    def local(a: LaneBlockedArray) -> jax.Array:
        shapes.append((a.shape, a.group_size))
        return a.dequantize()

    spec = PartitionSpec("tp", None) if side == "out" else PartitionSpec(None, "tp")
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(cut.spec,), out_specs=spec, check_vma=False))
    np.testing.assert_array_equal(mapped(cut.weight), floats)
    assert set(shapes) == {((16, 1024) if side == "out" else (64, 256), array.group_size)}
    assert type_of(cut.weight) == kind
    np.testing.assert_array_equal(to_blocks(cut.weight), raw)


@pytest.mark.parametrize(("rows", "columns", "side"), [(40, 256, "out"), (48, 256, "out"), (16, 144, "in")])
def test_what_cannot_be_cut_in_lanes_is_cut_plain(rows: int, columns: int, side: str) -> None:
    array = affine(4, rows, columns, 16, "minimum")
    mesh = Mesh(np.array(jax.devices()[: 2 if rows != 48 else 4]), ("tp",))
    if side == "in":
        mesh = Mesh(np.array(jax.devices()[:3]), ("tp",))
    cut = partition(to_lanes(array), mesh, "tp", side)
    assert_same(cut.weight, array)


def test_one_scale_a_channel_is_not_cut_along_the_columns() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    with pytest.raises(ValueError, match="128 columns into 2 equal parts"):
        partition(to_lanes(affine(8, 32, 128, None, "symmetric")), mesh, "tp", "in")
    cut = partition(to_lanes(affine(8, 32, 128, None, "symmetric")), mesh, "tp", "out")
    assert isinstance(cut.weight, LaneBlockedArray)


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_written_to_the_bytes_it_came_from(kind: str) -> None:
    raw = blocks(kind, 24, 512)
    lanes = to_lanes(from_blocks(kind, raw))  # pyright: ignore[reportArgumentType]
    assert type_of(lanes) == kind
    np.testing.assert_array_equal(to_blocks(lanes), raw)


def test_another_repack_is_given_each_plane() -> None:
    array = affine(5, 32, 64, 32, "zero")
    seen = []

    def repack(data: np.ndarray, plane: Plane, columns: int, flip: int) -> np.ndarray:
        seen.append((data.shape, plane, columns, flip))
        return np.zeros((2, columns // 32, plane.width, 64), np.uint8)

    lanes = to_lanes(array, repack)
    assert seen == [((32, 32), Plane(4, 8), 64, 0), ((32, 8), Plane(1, 2), 64, 0)]
    assert lanes.shape == array.shape
    to_lanes(affine(8, 32, 64, 32, "symmetric"), repack)
    assert seen[-1] == ((32, 64), Plane(8, 1), 64, 0x80)


def test_says_what_lanes_do_not_serve() -> None:
    array = affine(4, 16, 96, 32, "symmetric")
    cases = [
        (np.zeros((4, 4), np.float32), "ndarray has no planes"),
        (from_blocks("IQ2_XS", blocks("IQ2_XS", 4, 256)), "RawBlockArray has no planes"),
        (jax.tree.map(lambda leaf: leaf[None], array), "3 axes"),
        (jax.tree.map(lambda leaf: leaf[:0], array), "no weights"),
        (affine(4, 16, 96, 48, "symmetric"), "groups of 48: neither 16, nor a multiple of 32, nor all 96 columns"),
        (affine(4, 16, 96, 8, "symmetric"), "groups of 8"),
        (AffineArray((array.planes[0],), array.scale, None, (Plane(1, 4),)), "planes of 1 bits"),
        (affine(8, 16, 96, 32, "symmetric").replace(offset=7), "offset that is neither 0 nor 128"),
    ]
    for given_array, words in cases:
        assert words in (serves_lanes(given_array) or "")
    with pytest.raises(ValueError, match=r"expected an array that lanes serve, got AffineArray.* groups of 48"):
        to_lanes(cases[4][0])  # pyright: ignore[reportArgumentType]
