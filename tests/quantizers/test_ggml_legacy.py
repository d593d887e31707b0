"""Every encoder against `gguf.quants.quantize`, byte for byte, over ordinary and hostile floats."""

import gguf
import gguf.quants as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.quantizers.ggml_legacy import check_finite, encode, encoders

COLUMNS = 1024
LARGEST = np.finfo(np.float32).max


def bits(rng: np.random.Generator, low: int, high: int, rows: int) -> np.ndarray:
    """Random float32 with exponent fields in [low, high), random signs."""
    field = rng.integers(low, high, (rows, COLUMNS), dtype=np.uint32) << 23
    rest = rng.integers(0, 2**23, (rows, COLUMNS), dtype=np.uint32)
    sign = rng.integers(0, 2, (rows, COLUMNS), dtype=np.uint32) << 31
    return (field | rest | sign).view(np.float32)


def per_block(rng: np.random.Generator, low: int, high: int, rows: int) -> np.ndarray:
    """Normal numbers times a power of two a block of 32, from 2^low to 2^high; rounded once, to subnormals too."""
    x = rng.standard_normal((rows, COLUMNS // 32, 32))
    scaled = np.ldexp(x, rng.integers(low, high, (rows, COLUMNS // 32, 1)))
    return scaled.clip(-LARGEST, LARGEST).reshape(rows, COLUMNS).astype(np.float32)


def ties(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Multiples of half a step, with the extremes that make the step a power of two for each type."""
    x = rng.integers(-254, 255, (rows, COLUMNS)).astype(np.float32) / 2
    x.reshape(-1, 32)[:, 0] = rng.choice([127, -127, 8, -8, 16, -16, 15, 31, 1], x.size // 32)
    limit = np.abs(x.reshape(-1, 32)[:, :1])
    return (np.clip(x.reshape(-1, 32), -limit, limit) * np.float32(0.25)).reshape(rows, COLUMNS)


def below_powers_of_two() -> np.ndarray:
    """Blocks whose largest number lies 1 to 64 places below a power of two: where float32's log2 rounds up."""
    power = np.arange(1, 256, dtype=np.uint32)[:, None] << 23
    largest = (power - np.arange(1, 65, dtype=np.uint32)).view(np.float32).reshape(-1, 1)
    shape = np.random.default_rng(5).uniform(-1, 1, (largest.size, 32)).astype(np.float32)
    shape[:, 7] = 1
    x = (shape * largest).reshape(-1)
    return x[: x.size // COLUMNS * COLUMNS].reshape(-1, COLUMNS)


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    constants = np.repeat([1, -1, 0.1, -3.3e38, 1e-40, 7e-46, 3.4e38, 65504, 1e-8], COLUMNS).astype(np.float32)
    sparse = rng.standard_normal((16, COLUMNS), dtype=np.float32)
    return {
        "normal": rng.standard_normal((256, COLUMNS), dtype=np.float32),
        "uniform": rng.uniform(-1, 1, (256, COLUMNS)).astype(np.float32) * np.float32(0.02),
        "positive": rng.uniform(0.5, 1, (64, COLUMNS)).astype(np.float32),
        "any exponent in one block": bits(rng, 0, 255, 64),
        "subnormals": bits(rng, 0, 1, 64),
        "around the smallest normal number": per_block(rng, -150, -110, 128),
        "where inverses overflow": bits(rng, 0, 4, 64),
        "every block another exponent": per_block(rng, -149, 128, 128),
        "huge": bits(rng, 250, 255, 64),
        "around float16's largest": per_block(rng, 10, 24, 64),
        "around float16's smallest": per_block(rng, -30, -10, 64),
        "ties": ties(rng, 128),
        "zero": np.zeros((1, COLUMNS), np.float32),
        "minus zero": -np.zeros((1, COLUMNS), np.float32),
        "sparse": np.where(rng.random(sparse.shape) < 0.9, np.float32(0), sparse),
        "constant": constants.reshape(-1, COLUMNS),
        "below powers of two": below_powers_of_two(),
    }


SAMPLES = samples()


def expected(name: str, w: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return oracle.quantize(w, gguf.GGMLQuantizationType[name]).view(np.uint8)


def assert_same(name: str, w: np.ndarray, array: jax.Array | np.ndarray, sample: str = "") -> None:
    got, want, size = np.asarray(array), expected(name, w), encoders[name]
    assert got.dtype == np.uint8
    assert got.shape == want.shape
    differing = np.nonzero((got != want).reshape(-1, size.block_bytes).any(axis=-1))[0]
    if differing.size:
        block = w.reshape(-1, size.block_size)[differing[0]]
        pair = [packed.reshape(-1, size.block_bytes)[differing[0]] for packed in (got, want)]
        pytest.fail(
            f"{sample}: {differing.size} blocks differ; first {differing[0]}: {block!r}\ngot  {pair[0]}\nwant {pair[1]}"
        )


@pytest.mark.parametrize("name", encoders)
def test_equals_gguf_byte_for_byte(name):
    together = encode(name, jnp.asarray(np.concatenate(list(SAMPLES.values()))))
    ends = np.cumsum([len(sample) for sample in SAMPLES.values()])
    for sample, got in zip(SAMPLES, np.split(np.asarray(together), ends[:-1]), strict=True):
        assert_same(name, SAMPLES[sample], got, sample)


@pytest.mark.parametrize("name", encoders)
def test_inside_a_larger_program(name):
    w = np.concatenate([SAMPLES["normal"][:8], SAMPLES["ties"][:8], SAMPLES["every block another exponent"][:8]])
    got = jax.jit(lambda x: encode(name, x.reshape(3, 8, COLUMNS)))(jnp.asarray(w))
    assert_same(name, w.reshape(3, 8, COLUMNS), got)


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_without_jit(name):
    with jax.disable_jit():
        assert_same(name, SAMPLES["ties"], encode(name, SAMPLES["ties"]))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_plain_floats_take_infinities_and_nan(name):
    w = np.array([[np.inf, -np.inf, 65519.9, 65520.0, -3.4e38, 1e-41]], np.float32)
    assert_same(name, w, encode(name, w))
    nan = np.asarray(encode(name, np.full((1, 4), np.nan, np.float32)))
    decoded = nan.view(np.float16) if name == "F16" else nan.view(np.uint16).astype(np.uint32) << 16
    assert np.isnan(decoded if name == "F16" else decoded.view(np.float32)).all()


@pytest.mark.parametrize("name", encoders)
def test_the_program_does_not_grow_with_the_rows(name):
    def lines(rows: int) -> int:
        shape = jax.ShapeDtypeStruct((rows, COLUMNS), jnp.float32)
        return len(jax.jit(encode, static_argnums=0).lower(name, shape).as_text().splitlines())

    assert lines(2) == lines(512)


@pytest.mark.parametrize("name", encoders)
def test_block_sizes_are_ggmls(name):
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (encoders[name].block_size, encoders[name].block_bytes) == sizes


def test_bad_input_is_refused():
    with pytest.raises(QjaxError, match=r"expected rows of a multiple of 32 weights for Q4_0, got shape \(2, 33\)"):
        encode("Q4_0", np.zeros((2, 33), np.float32))
    with pytest.raises(QjaxError, match=r"one of F16, BF16, Q4_0.*got 'Q4_K'"):
        encode("Q4_K", np.zeros((2, 256), np.float32))


def test_check_finite_names_the_tensor():
    w = np.zeros((3, 5), np.float32)
    check_finite("blk.0.ffn_up.weight", w)
    w[1, 2], w[2, 0] = np.nan, np.inf
    with pytest.raises(QjaxError, match=r"'blk.0.ffn_up.weight'.* 2 of 15 .*\[1, 2\]"):
        check_finite("blk.0.ffn_up.weight", w)
    with pytest.raises(QjaxError, match="1 of 1 "):
        check_finite("x", jnp.asarray(jnp.inf, jnp.float32))
