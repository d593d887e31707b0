"""Laws of packed arrays, against the oracle `gguf.quants`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.arrays import AffineArray, QuantizedArray, memory, partition
from qjax.formats.gguf import from_blocks, to_blocks, type_of
from qjax.formats.gguf.arrays import BLOCK_TYPES, FLOAT_TYPES, RAW_TYPES

PACKED = sorted(BLOCK_TYPES) + sorted(RAW_TYPES)
# One of each family and way to hold scales: what a transformation does to leaves depends on no more.
FAMILIES = ["Q5_1", "Q8_0", "Q3_K", "Q4_K", "IQ4_XS", "MXFP4", "TQ2_0"]


def random_bytes(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes are the whole space: every code, subnormal, infinite and NaN scales included."""
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return np.random.default_rng(seed).integers(0, 256, (rows, columns // size * nbytes), dtype=np.uint8)


def finite(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Bytes of a weight that a model could have."""
    raw = random_bytes(kind, rows, columns, seed)
    with np.errstate(all="ignore"):
        good = np.abs(quants.dequantize(raw, GGMLQuantizationType[kind])) < 1e4
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks, ok = raw.reshape(-1, nbytes), good.reshape(-1, size).all(axis=1)
    return np.where(ok[:, None], blocks, np.uint8(0)).reshape(raw.shape)


def oracle(kind: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, GGMLQuantizationType[kind])


def assert_same_bits(ours: jax.Array, theirs: np.ndarray) -> None:
    ours = np.asarray(ours)
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@jax.jit
def jitted(array: QuantizedArray) -> jax.Array:
    """One function for all tests, and few shapes: what one has compiled the others use."""
    return array.dequantize()


@pytest.mark.parametrize("kind", PACKED)
def test_dequantize_is_the_oracle_bit_for_bit(kind: str) -> None:
    raw = random_bytes(kind, 96, 768, 1)
    array, floats = from_blocks(kind, raw), oracle(kind, raw)
    assert array.shape == floats.shape == (96, 768)
    assert_same_bits(jitted(array), floats)
    # Operation by operation, each a program: one of each family; the raw ones have a test of their own.
    if kind in ("Q5_1", "Q4_K", "IQ4_XS"):
        assert_same_bits(array.dequantize(), floats)


@given(st.sampled_from(sorted(BLOCK_TYPES)), st.integers(0, 2**31))
@settings(max_examples=40)
def test_dequantize_holds_for_any_bytes(kind: str, seed: int) -> None:
    raw = random_bytes(kind, 96, 768, seed)
    assert_same_bits(jitted(from_blocks(kind, raw)), oracle(kind, raw))


@pytest.mark.parametrize("kind", [k for k in BLOCK_TYPES if k not in ("MXFP4",)])
@pytest.mark.parametrize("bits", [0x0001, 0x03FF, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0x0000, 0x8000, 0x7BFF])
def test_extreme_scales(kind: str, bits: int) -> None:
    raw = random_bytes(kind, 96, 768, 2)
    block = BLOCK_TYPES[kind]
    blocks = raw.reshape(-1, sum(field.nbytes for field in block.fields))
    at = 0
    for field in block.fields:
        if field.dtype == np.float16:
            blocks[:, at : at + 2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
        at += field.nbytes
    assert_same_bits(jitted(from_blocks(kind, raw)), oracle(kind, raw))


@pytest.mark.parametrize("kind", PACKED)
def test_written_back_to_the_same_bytes(kind: str) -> None:
    raw = random_bytes(kind, 8, 512, 3)
    array = from_blocks(kind, raw)
    assert type_of(array) == kind
    np.testing.assert_array_equal(to_blocks(array), raw)
    assert array.nbytes == raw.nbytes


@pytest.mark.parametrize("kind", sorted(FLOAT_TYPES))
def test_float_types(kind: str) -> None:
    raw = np.random.default_rng(0).standard_normal((4, 32)).astype(FLOAT_TYPES[kind]).view(np.uint8)
    array = from_blocks(kind, raw)
    if kind != "F64":  # rounded to float32 on loading
        assert type_of(array) == kind
        np.testing.assert_array_equal(to_blocks(array), raw)
    np.testing.assert_array_equal(np.asarray(array, np.float32), raw.view(FLOAT_TYPES[kind]).astype(np.float32))


@pytest.mark.parametrize("kind", FAMILIES)
def test_works_under_every_transformation(kind: str) -> None:
    array, other = (from_blocks(kind, finite(kind, 16, 512, seed)) for seed in (0, 1))
    floats = oracle(kind, finite(kind, 16, 512))
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), other, array)
    assert stacked.shape == (2, 16, 512)
    shapes = []

    @jax.jit
    def everything(array: QuantizedArray, stacked: QuantizedArray, rows: jax.Array) -> Any:
        """One program: each of the ways is compiled into it."""
        mapped = jax.vmap(lambda a: (shapes.append(a.shape), a.dequantize())[1])(stacked)
        _, scanned = jax.lax.scan(lambda c, a: (c, a.dequantize()), 0, stacked)
        return stacked.dequantize(), mapped, scanned, array.take(rows)

    *both, taken = everything(array, stacked, jnp.array([[3, 0], [15, 3]]))
    assert shapes == [(16, 512)], "the shape is that of one layer inside vmap"
    for pair in both:
        np.testing.assert_array_equal(pair[1], floats)
    np.testing.assert_array_equal(taken[1, 0], floats[15])
    moved = jax.device_put(array, jax.devices()[3])
    assert {d for leaf in jax.tree.leaves(moved) for d in leaf.devices()} == {jax.devices()[3]}
    np.testing.assert_array_equal(jitted(moved), floats)
    # No names and no shapes in the treedef: layers of equal types share one compiled program.
    other = from_blocks(kind, finite(kind, 32, 512, seed=1))
    assert jax.tree.structure(other) == jax.tree.structure(array)
    hash(jax.tree.structure(array))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("side", ["out", "in"])
def test_shards_along_both_sides(kind: str, side: str) -> None:
    raw = finite(kind, 16, 1024)
    array, floats = from_blocks(kind, raw), oracle(kind, raw)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    cut = partition(array, mesh, "tp", side)
    leaf = jax.tree.leaves(cut)[0]
    assert len(leaf.sharding.device_set) == 4
    assert not leaf.sharding.is_fully_replicated
    np.testing.assert_array_equal(jitted(cut.weight), floats)
    # Plain device_put with a sharding of the leaves does as well.
    spec = NamedSharding(mesh, PartitionSpec("tp", None))
    put = jax.device_put(array, spec)
    np.testing.assert_array_equal(jitted(put), floats)


def test_cuts_only_on_group_borders() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    array = from_blocks("Q4_K", finite("Q4_K", 16, 768))
    with pytest.raises(ValueError, match="768 columns into 4 equal parts on borders of 256"):
        partition(array, mesh, "tp", "in")
    with pytest.raises(ValueError, match="18 rows into 4"):
        partition(from_blocks("Q4_0", finite("Q4_0", 18, 768)), mesh, "tp", "out")


def test_donation_reuses_the_packed_buffers() -> None:
    array = from_blocks("Q4_0", finite("Q4_0", 64, 512))
    kept = np.array(array.scale)  # a view would hold the buffer
    doubled = jax.jit(lambda a: a.replace(scale=a.scale * 2), donate_argnums=0)(array)
    assert array.scale.is_deleted()
    np.testing.assert_array_equal(np.asarray(doubled.scale), kept * 2)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q4_K", "IQ4_XS", "IQ2_XS"])
def test_saved_without_pickle(kind: str) -> None:
    array, other = (from_blocks(kind, finite(kind, 8, 512, seed)) for seed in (0, 1))
    restored = serialization.from_bytes(other, serialization.to_bytes(array))
    np.testing.assert_array_equal(to_blocks(restored), to_blocks(array))


@pytest.mark.filterwarnings("ignore")
def test_saved_by_orbax(tmp_path: object) -> None:
    import orbax.checkpoint as ocp

    tree = {"w": from_blocks("Q4_K", finite("Q4_K", 8, 512))}
    with ocp.StandardCheckpointer() as saver:
        saver.save(f"{tmp_path}/a", tree)
        saver.wait_until_finished()
        restored = saver.restore(f"{tmp_path}/a", tree)
    np.testing.assert_array_equal(to_blocks(restored["w"]), to_blocks(tree["w"]))


def test_memory_counts_each_array_once() -> None:
    array = from_blocks("Q4_0", finite("Q4_0", 64, 512))
    once = memory({"a": array})
    assert once == (64 * 512 * 18 // 32, 64 * 512 * 2, 64 * 512)
    assert once.bits_per_weight == array.bits_per_weight == 4.5
    assert once.ratio == pytest.approx(16 / 4.5)
    assert memory({"a": array, "tied": array}) == once
    assert memory({"a": array, "norm": jnp.ones(512, jnp.float32)}).nbytes == once.nbytes + 2048


def test_sizes_against_16_bit_floats() -> None:
    """INT8 at least 1.85 times and INT4 at least 3.5 times smaller, scales included."""
    for kind, least in (("Q8_0", 1.85), ("Q4_0", 3.5), ("Q4_K", 3.5)):
        assert memory(from_blocks(kind, finite(kind, 64, 512))).ratio >= least


def test_repr_tells_what_it_is() -> None:
    assert repr(from_blocks("Q4_0", finite("Q4_0", 64, 512))) == (
        "AffineArray(64x512, 4-bit symmetric, groups of 32, float16 scales, 4.50 bits/weight)"
    )
    for kind in PACKED:
        assert "8x512" in repr(from_blocks(kind, finite(kind, 8, 512)))
    # Trees of placeholders are printed by JAX in its own errors.
    assert "AffineArray" in repr(jax.tree.map(lambda _: None, from_blocks("Q4_0", finite("Q4_0", 8, 512))))


def test_dequantize_rounds_to_other_dtypes() -> None:
    array = from_blocks("Q6_K", finite("Q6_K", 8, 512))
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jax.jit(lambda a, dtype=dtype: a.dequantize(dtype))(array)
        assert half.dtype == dtype
        np.testing.assert_array_equal(half, jitted(array).astype(dtype))


def test_no_gguf_type_holds_other_scales() -> None:
    from qjax.errors import UnsupportedError

    for kind in ("Q4_0", "Q4_K", "IQ4_NL"):
        array = from_blocks(kind, finite(kind, 8, 512))
        cast = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float16 else a, array)
        with pytest.raises(UnsupportedError, match="without loss"):
            to_blocks(cast)


def test_channel_scale_is_a_group() -> None:
    """group = channel: one scale a row."""
    codes = np.random.default_rng(0).integers(-127, 128, (8, 96), dtype=np.int8)
    scale = np.random.default_rng(1).random((8, 1), dtype=np.float32)
    from qjax.arrays import Plane

    array = AffineArray((jnp.asarray(codes.view(np.uint8)),), jnp.asarray(scale), None, (Plane(8, 1),), 128)
    np.testing.assert_array_equal(array.dequantize(), codes * scale)
    assert array.group_size == 96
    assert "one scale a channel" in repr(array)
