"""Every raw type against `gguf.quants.dequantize`, bit for bit, on random bytes and on hostile scales."""

import gguf
import gguf.quants as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.arrays import lattices
from qjax.arrays.raw_decode import BLOCKS, decode, decoders

# Where the float16 scale lies; NVFP4 has none, IQ1_M deals it over the upper nibbles of four words.
SCALE_AT = dict.fromkeys(decoders, 0) | {"TQ1_0": 52, "TQ2_0": 64, "NVFP4": None, "IQ1_M": None}
# Zeros, the ends of the subnormals, the largest number, infinities, NaNs.
SCALES = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x83FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0xFE00], dtype=np.uint16)
IQ_TYPES = [name for name in decoders if name.startswith("IQ")]


def random_blocks(name: str, *lead: int) -> np.ndarray:
    """Random bytes; the first twelve blocks carry one of SCALES each."""
    rng = np.random.default_rng(sum(name.encode()))
    blocks = rng.integers(0, 256, (*lead, decoders[name].block_bytes), dtype=np.uint8)
    flat = blocks.reshape(-1, blocks.shape[-1])
    at = SCALE_AT[name]
    if at is not None:
        flat[: len(SCALES), at : at + 2] = SCALES.view(np.uint8).reshape(-1, 2)
    elif name == "IQ1_M":
        nibbles = ((SCALES[:, None] >> np.array([0, 4, 8, 12], np.uint16)) & 15).astype(np.uint8)
        odd = flat[: len(SCALES), 49:56:2]
        flat[: len(SCALES), 49:56:2] = (odd & 15) | (nibbles << 4)
    return blocks


def expected(name: str, blocks: np.ndarray) -> np.ndarray:
    rows = blocks.reshape(*blocks.shape[:-2], -1)
    if name == "Q1_0":  # gguf 0.19 knows its size only: ggml's `y = bit ? d : -d`, bits lowest first
        d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        bit = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
        return np.where(bit == 1, d, -d).reshape(*blocks.shape[:-2], -1)
    with np.errstate(invalid="ignore"):
        return oracle.dequantize(rows, gguf.GGMLQuantizationType[name])


def same_bits(array: jax.Array, want: np.ndarray) -> None:
    got = np.asarray(array)
    assert got.dtype == want.dtype == np.float32
    assert got.shape == want.shape
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


@pytest.mark.parametrize("name", decoders)
def test_equals_gguf_bit_for_bit(name):
    blocks = random_blocks(name, 64, 16)
    want = expected(name, blocks)
    if SCALE_AT[name] is not None or name == "IQ1_M":
        assert np.isnan(want).any()
        assert np.isinf(want).any()
        assert (want.view(np.uint32) == 0x80000000).any()
    same_bits(jax.jit(decode, static_argnums=0)(name, jnp.asarray(blocks)), want)
    # Operation by operation, each a program: one of each kind.
    if name in ("IQ1_M", "IQ3_S", "TQ1_0", "NVFP4"):
        same_bits(decode(name, jnp.asarray(blocks)), want)


@pytest.mark.parametrize("name", decoders)
def test_equals_gguf_inside_a_larger_program(name):
    """An addition right behind the scale's multiplication: a fused multiply-add would round differently."""
    blocks = random_blocks(name, 8, 8)
    want = expected(name, blocks)
    other = np.random.default_rng(3).standard_normal(want.shape, dtype=np.float32)

    @jax.jit
    def program(blocks, other):
        return decode(name, blocks) + other, jnp.sum(decode(name, blocks), axis=-1)

    with np.errstate(invalid="ignore"):
        same_bits(program(jnp.asarray(blocks), other)[0], want + other)


def test_e4m3_scales_of_nvfp4_are_all_decoded():
    blocks = random_blocks("NVFP4", 64)
    blocks[:, :4] = np.arange(256, dtype=np.uint8).reshape(64, 4)
    same_bits(decode("NVFP4", jnp.asarray(blocks)[None]), expected("NVFP4", blocks[None]))


@pytest.mark.parametrize("name", decoders)
def test_leading_axes_and_vmap(name):
    blocks = random_blocks(name, 2, 1, 3, 2, 4)
    want = expected(name, blocks)

    @jax.jit
    def program(blocks):
        return decode(name, blocks), decode(name, blocks[0, 0, 0, 0]), jax.vmap(lambda b: decode(name, b))(blocks[0, 0])

    for got, part in zip(program(jnp.asarray(blocks)), (want, want[0, 0, 0, 0], want[0, 0]), strict=True):
        same_bits(got, part)


@pytest.mark.parametrize("name", decoders)
def test_the_program_does_not_grow_and_stays_low_in_rank(name):
    def text(rows: int) -> str:
        shape = jax.ShapeDtypeStruct((2, 2, rows, 4, decoders[name].block_bytes), jnp.uint8)
        return jax.jit(decode, static_argnums=0).lower(name, shape).as_text()

    small, large = text(2), text(64)
    assert len(small.splitlines()) == len(large.splitlines())
    ranks = {part.split(">")[0].count("x") for part in large.split("tensor<")[1:]}
    assert max(ranks) <= 6


@pytest.mark.parametrize("axes", [("x", None, None), (None, "x", None)])
@pytest.mark.parametrize("name", ["IQ1_M", "IQ2_S", "IQ3_S", "TQ1_0", "NVFP4"])
def test_sharded_blocks_are_decoded_where_they_lie(name, axes):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    blocks = random_blocks(name, 8, 8)
    placed = jax.device_put(blocks, NamedSharding(mesh, PartitionSpec(*axes)))
    compiled = jax.jit(decode, static_argnums=0).lower(name, placed).compile()
    assert "all-gather" not in str(compiled.as_text())
    got = compiled(placed)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*axes[:2])), got.ndim)
    same_bits(got, expected(name, blocks))


@pytest.mark.parametrize("name", decoders)
def test_block_sizes_are_ggmls(name):
    assert BLOCKS[name] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def test_every_type_that_gguf_decodes_is_raw_or_has_a_family():
    families = {"F16", "BF16", "MXFP4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    families |= {"IQ4_NL", "IQ4_XS"}
    known = {kind.name for kind in oracle._type_traits}
    assert known <= families | set(decoders)


def test_unknown_type_and_wrong_bytes_are_refused():
    with pytest.raises(ValueError, match=r"expected a type held as raw blocks, one of IQ1_S.*got 'Q4_K'"):
        decode("Q4_K", jnp.zeros((1, 1, 144), jnp.uint8))
    with pytest.raises(ValueError, match=r"expected IQ2_S blocks of 82 bytes, got shape \(1, 1, 81\)"):
        decode("IQ2_S", jnp.zeros((1, 1, 81), jnp.uint8))


@pytest.mark.parametrize("name", IQ_TYPES)
def test_every_lattice_point(name):
    quant = getattr(oracle, name)
    quant.init_grid()
    grid = np.asarray(quant.grid).reshape(quant.grid_shape)
    assert lattices.point_words(name).nbytes <= 4096
    index = jnp.arange(len(grid), dtype=jnp.uint16)
    points = lattices.points_of_4 if name.startswith("IQ3") else lattices.points_of_8
    np.testing.assert_array_equal(np.asarray(points(name, index)).reshape(grid.shape), grid)


def test_parity_gives_the_sign_table():
    signs = lattices.with_parity(jnp.arange(128, dtype=jnp.uint32))
    np.testing.assert_array_equal(np.asarray(signs), np.frombuffer(oracle.IQ2_XXS.ksigns, np.uint8))
