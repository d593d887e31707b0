"""GPTQ's and AWQ's tensors: as the peers' packers write them, through our arrays, and back to the same bytes."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes  # noqa: F401 - names bfloat16 to numpy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.arrays import AffineArray, TransformedArray, affine
from qjax.arrays.scheme import layout_for
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats.affine_parts import affine_parts
from qjax.formats.gguf import from_blocks
from qjax.formats.huggingface import awq, gptq
from qjax.formats.huggingface.awq import AWQFacts
from qjax.formats.huggingface.checkpoint import open_checkpoint
from qjax.formats.huggingface.gptq import GPTQFacts
from qjax.formats.huggingface.words import pack_words, unpack_words, words_for
from qjax.kernels.layout import lay_out

STORED = np.load(Path(__file__).with_name("packed.npz"))
KINDS = sorted({name.split("/")[0] for name in STORED} - {name.split("/")[0] for name in STORED if name[0].isdigit()})
Tensors = dict[str, np.ndarray]


def stored(kind: str) -> tuple[Tensors, np.ndarray]:
    """The tensors of a kind by suffix, and the floats that they stand for."""
    tensors = {name.split("/")[1]: STORED[name] for name in STORED if name.split("/")[0] == kind}
    return tensors, STORED[f"{kind.split('-', 2)[2]}/w"]


@jax.jit
def floats(array: Any) -> jax.Array:
    return array.dequantize()


def same(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for suffix in a:
        assert a[suffix].dtype == b[suffix].dtype
        np.testing.assert_array_equal(a[suffix], b[suffix], suffix)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("gptq")])
def test_gptq_as_a_peer_packs_it(kind: str) -> None:
    tensors, w = stored(kind)
    facts = GPTQFacts(int(kind.split("-")[2]), 1 if "-v1-" in kind else 2)
    array = gptq.read(tensors, facts)
    assert isinstance(array, AffineArray)
    assert (array.zero is None) == kind.endswith("-sym")
    np.testing.assert_array_equal(floats(array), w)
    same(gptq.write(array, facts), tensors)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("awq")])
def test_awq_as_a_peer_packs_it(kind: str) -> None:
    tensors, w = stored(kind)
    array = awq.read(tensors, AWQFacts())
    assert (array.zero is None) == kind.endswith("-sym")
    np.testing.assert_array_equal(floats(array), w)
    same(awq.write(array, AWQFacts()), tensors)


@given(st.data(), st.integers(1, 8), st.integers(0, 100))
def test_words_give_their_codes_back(data: st.DataObject, bits: int, n: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    codes = rng.integers(0, 1 << bits, (3, n)).astype(np.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (3, words_for(n, bits))
    np.testing.assert_array_equal(unpack_words(words, bits, n), codes)


class Drawn(NamedTuple):
    """A matrix of codes in groups, with zero points from `least_zero` on or without, its columns in order or not."""

    bits: int
    rows: int
    columns: int
    groups: int
    asymmetric: bool
    act_order: bool
    dtype: str
    seed: int

    def array(self, least_zero: int = 0) -> AffineArray | TransformedArray:
        rng = np.random.default_rng(self.seed)
        out, columns = 32 * self.rows, 32 * self.columns
        codes = rng.integers(0, 1 << self.bits, (out, columns)).astype(np.uint8)
        scale = rng.uniform(0.001, 1, (out, self.groups)).astype(self.dtype)
        zero = rng.integers(least_zero, 1 << self.bits, scale.shape).astype(np.uint8) if self.asymmetric else None
        array = affine(codes, scale, zero, self.bits)
        order = rng.permutation(columns).astype(np.int32)
        return TransformedArray(array, columns=order) if self.act_order else array


def drawn(bits: tuple[int, ...]) -> st.SearchStrategy[Drawn]:
    sizes, flags = st.integers(1, 4), st.booleans()
    dtypes = st.sampled_from(["float16", "bfloat16"])
    groups = st.sampled_from([1, 2, 4, 8])
    return st.builds(Drawn, st.sampled_from(bits), sizes, sizes, groups, flags, flags, dtypes, st.integers(0, 10_000))


def check(array: AffineArray | TransformedArray, back: AffineArray | TransformedArray) -> None:
    """The same codes, scales and zero points for the model's columns."""
    a, b = affine_parts(array, "?"), affine_parts(back, "?")
    np.testing.assert_array_equal(a.codes(), b.codes())
    for x, y in ((a.array.scale, b.array.scale), (a.zeros, b.zeros)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x[:, a.group_of_columns()], y[:, b.group_of_columns()])


@given(drawn(gptq.BITS))
def test_gptq_gives_back_what_it_was_given(case: Drawn) -> None:
    for version in (1, 2):
        array = case.array(least_zero=2 - version)
        facts = GPTQFacts(case.bits, version)
        tensors = gptq.write(array, facts)
        back = gptq.read(tensors, facts)
        check(array, back)
        same(gptq.write(back, facts), tensors)


@given(drawn((4,)), st.sampled_from(["gemm", "gemv"]))
def test_awq_gives_back_what_it_was_given(case: Drawn, version: Literal["gemm", "gemv"]) -> None:
    array = case._replace(act_order=False).array()
    assert isinstance(array, AffineArray)
    facts = AWQFacts(version, array.group_size)
    tensors = awq.write(array, facts)
    back = awq.read(tensors, facts)
    check(array, back)
    same(awq.write(back, facts), tensors)


def test_gemv_pads_as_its_kernels_read() -> None:
    shapes = {128: ((8, 1), (8, 8)), 64: ((8, 2), (8, 16)), 32: ((8, 4), (8, 32))}
    for group, (zeros, scales) in shapes.items():
        array = affine(np.zeros((8, 512), np.uint8), np.ones((8, 512 // group), np.float16), None, 4)
        tensors = awq.write(array, AWQFacts("gemv", group))
        assert (tensors["qzeros"].shape, tensors["scales"].shape) == (zeros, scales)


def with_zeros(zeros: np.ndarray, bits: int) -> AffineArray:
    return affine(np.zeros((32, 32), np.uint8), np.ones((32, 1), np.float16), zeros.astype(np.uint8)[:, None], bits)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_a_zero_point_of_zero(bits: int) -> None:
    """Version 1 words are one number: where AutoRound stored 0 - 1, adding ones to the words gives all back."""
    zeros = np.arange(32) % min(1 << bits, 32)
    array = with_zeros(zeros, bits)
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        gptq.write(array, GPTQFacts(bits, 1))
    tensors = gptq.write(array, GPTQFacts(bits, 2))
    np.testing.assert_array_equal(gptq.read(tensors, GPTQFacts(bits, 2)).zero[:, 0], zeros)
    fields = unpack_words(tensors["qzeros"], bits, 32).astype(int) - 1
    if bits == 3:
        tensors["qzeros"] = pack_words((fields % 8).astype(np.uint8), bits)
    else:
        places = (1 << bits * np.arange(32 // bits)).astype(object)
        words = [int(sum(word * places)) % (1 << 32) for word in fields.reshape(-1, 32 // bits).astype(object)]
        tensors["qzeros"] = np.array([words], np.uint32).view(np.int32)
    np.testing.assert_array_equal(gptq.read(tensors, GPTQFacts(bits, 1)).zero[:, 0], zeros)


def test_gptqmodels_constants_of_three_bits() -> None:
    """Its version 1 of zero points 4, by its own constants for the words of a three."""
    tensors = gptq.write(with_zeros(np.full(32, 4), 3), GPTQFacts(3, 2))
    constants = np.array([0x24924924, 0x92492492, 0x49249249], np.uint32)
    tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) - constants).view(np.int32)
    array = gptq.read(tensors, GPTQFacts(3, 1))
    assert isinstance(array, AffineArray)
    assert array.zero is None


def test_from_gguf_and_from_lanes() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (32, 2, 18)).astype(np.uint8)
    blocks[..., :2] = np.float16(0.01).reshape(1).view(np.uint8)
    array = from_blocks("Q4_0", blocks.reshape(32, 36))
    for given_array in (array, lay_out("w", array)):
        tensors = gptq.write(given_array, GPTQFacts(4))
        np.testing.assert_array_equal(floats(gptq.read(tensors, GPTQFacts(4))), floats(array))


def test_what_a_format_cannot_hold() -> None:
    codes, scale = np.zeros((32, 64), np.uint8), np.ones((32, 2), np.float16)
    plain = affine(codes, scale, None, 4)
    with pytest.raises(UnsupportedError, match="2, 3, 4, 8 bits"):
        gptq.write(affine(codes, scale, None, 5), GPTQFacts(5))
    with pytest.raises(UnsupportedError, match="of 8 bits cannot hold"):
        gptq.write(plain, GPTQFacts(8))
    with pytest.raises(UnsupportedError, match="32 rows"):
        gptq.write(affine(codes[:8], scale[:8], None, 4), GPTQFacts(4))
    with pytest.raises(UnsupportedError, match="4 bits"):
        awq.write(affine(codes, scale, None, 8), AWQFacts())
    with pytest.raises(UnsupportedError, match="act-order"):
        awq.write(TransformedArray(plain, columns=np.arange(64, dtype=np.int32).reshape(2, 32).T.ravel()), AWQFacts())
    with pytest.raises(UnsupportedError, match="scale of inputs"):
        awq.write(TransformedArray(plain, input_scale=np.ones(64, np.float32)), AWQFacts())
    with pytest.raises(UnsupportedError, match="minimum"):
        awq.write(AffineArray(plain.planes, scale, scale, layout_for(4, 64)), AWQFacts())
    with pytest.raises(UnsupportedError, match="float32"):
        awq.write(affine(codes, np.full((32, 2), 0.1, np.float32), None, 4), AWQFacts())
    exact = affine(codes, np.full((32, 2), 0.5, np.float32), None, 4)
    np.testing.assert_array_equal(floats(awq.read(awq.write(exact, AWQFacts()), AWQFacts())), floats(exact))


def spoilt(suffix: str, change: object) -> Tensors:
    codes = np.random.default_rng(0).integers(0, 16, (32, 64)).astype(np.uint8)
    tensors = gptq.write(affine(codes, np.ones((32, 2), np.float16), None, 4), GPTQFacts(4))
    return {**tensors, suffix: change(tensors[suffix])}  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-1]),
        ("qweight", lambda t: t.astype(np.int64)),
        ("qweight", lambda t: t[:0]),
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t[0]),
        ("scales", lambda t: t[:0]),
        ("scales", lambda t: t[:, :-1]),
        ("scales", lambda t: t.astype(np.int32)),
        ("g_idx", lambda t: t - 1),
        ("g_idx", lambda t: t + 1),
        ("g_idx", lambda t: t[:-8]),
        ("g_idx", lambda t: t * 0),
        ("g_idx", lambda t: t.astype(np.float32)),
    ],
)
def test_spoilt_tensors_are_named(suffix: str, change: object) -> None:
    tensors = spoilt(suffix, change)
    with pytest.raises(QjaxError, match=r"^(qweight|qzeros|scales|g_idx) (is|has) "):
        gptq.read(tensors, GPTQFacts(4))
    if suffix != "g_idx":
        with pytest.raises(QjaxError, match=r"^(qweight|qzeros|scales) is "):
            awq.read({name: tensors[name] for name in awq.SUFFIXES}, AWQFacts())


def test_a_missing_tensor_is_named() -> None:
    tensors = gptq.write(affine(np.zeros((32, 64), np.uint8), np.ones((32, 2), np.float16), None, 4), GPTQFacts(4))
    for suffix in ("qweight", "qzeros", "scales"):
        with pytest.raises(FormatError, match=f"^{suffix} is missing"):
            gptq.read({name: t for name, t in tensors.items() if name != suffix}, GPTQFacts(4))


@pytest.mark.interop
@pytest.mark.parametrize("name", ["w2g32-asym", "w3g128", "w4g128", "w4g128-asym", "w8g32"])
def test_a_whole_checkpoint_comes_back(interop: Path, name: str) -> None:
    checkpoint = open_checkpoint(interop / f"hf-gptq-{name}")
    kinds = {"I32": np.int32, "F16": np.float16}
    seen = 0
    for weight in [n.removesuffix(".qweight") for n in checkpoint.tensors if n.endswith(".qweight")]:
        stored = {s: checkpoint.tensors[f"{weight}.{s}"] for s in gptq.SUFFIXES}
        tensors = {s: checkpoint.raw(t.name).view(kinds[t.dtype]).reshape(t.shape) for s, t in stored.items()}
        array = gptq.read(tensors, GPTQFacts(int(name[1])))
        zeros = affine_parts(array, "?").zeros
        if (zeros > 0).all():
            same(gptq.write(array, GPTQFacts(int(name[1]))), tensors)
            seen += 1
    assert seen >= 27
