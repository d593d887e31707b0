"""The C++ core: every instruction set of this CPU, every kind of weight, against float64; threads change no bit."""

import ctypes
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.arrays import AffineArray, codes_of, to_lanes
from qjax.arrays.planes import Plane, pack
from qjax.evaluate.synthetic import synthetic_blocks
from qjax.formats.gguf import from_blocks
from qjax.formats.gguf.arrays import BLOCK_TYPES
from qjax.kernels import native
from qjax.kernels.native import call, library, matmul
from qjax.kernels.nn import attend

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

LAYOUTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
HERE = [number for number in range(len(library.ISAS)) if library.available() and library.library().qjax_has_isa(number)]


def affine(bits: int, group: int, form: str, out: int, columns: int, seed: int) -> AffineArray:
    """Random codes; one bit a byte's plane, so that any number of columns is whole."""
    rng = np.random.default_rng(seed)
    layout = tuple(Plane(width, 1) for width in LAYOUTS[bits])
    codes = rng.integers(0, 1 << bits, (out, columns)).astype(np.uint8)
    groups, dtype = columns // group, np.float16 if seed % 2 else np.float32
    symmetric = form == "symmetric"
    if bits == 8 and symmetric:
        codes ^= np.uint8(128)
    return AffineArray(
        pack(codes, layout),
        rng.uniform(-0.1, 0.1, (out, groups)).astype(dtype),
        rng.standard_normal((out, groups)).astype(dtype) if form == "minimum" else None,
        layout=layout,
        offset=1 << (bits - 1) if symmetric else 0,
        zero=rng.integers(0, 1 << bits, (out, groups)).astype(np.uint8) if form == "zero" else None,
    )


def rounded(x: np.ndarray) -> np.ndarray:
    """x in int8 by groups of 32 columns, as float64: written anew, apart from kernels/int8.py."""
    rows, columns = x.shape
    padded = np.zeros((rows, -(-columns // 32) * 32), np.float32)
    padded[:, :columns] = x
    groups = padded.reshape(rows, -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    whole = np.rint(groups * (np.float32(1) / np.where(scale > 0, scale, 1)))
    return (whole.astype(np.float64) * scale).reshape(rows, -1)[:, :columns]


def by_definition(array: AffineArray) -> np.ndarray:
    """float64 scale * (code - offset - zero) + minimum."""
    wide = lambda leaf: 0 if leaf is None else leaf.astype(np.float64)[..., None]
    codes = codes_of(array).astype(np.float64).reshape(*array.scale.shape, -1)
    return (wide(array.scale) * (codes - array.offset - wide(array.zero)) + wide(array.minimum)).reshape(array.shape)


@jax.jit
def products(x: jax.Array, lanes: Any) -> dict[tuple[str, str], jax.Array]:
    """By every instruction set of this CPU and either rounding of x, as one program."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for isa in HERE:
            monkeypatch.setattr(matmul, "isa_number", lambda isa=isa: isa)
            for rounding in ("none", "groups"):
                (found[library.ISAS[isa], rounding],) = matmul._call(x, (lanes,), rounding=rounding)
    return found


def check(array: Any, floats: np.ndarray, rows: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, array.shape[1])).astype(np.float32)
    found = products(x, to_lanes(array))
    assert len(found) == 2 * len(HERE)
    for (isa, rounding), ours in found.items():
        wanted = rounded(x) if rounding == "groups" else x.astype(np.float64)
        # Rounding is bounded by what is summed; minimums and zeros may cancel most of it.
        size = (np.abs(wanted) @ np.abs(floats).T).max() + np.abs(wanted).sum(1).max() * np.abs(floats).max()
        assert np.abs(np.asarray(ours) - wanted @ floats.T).max() <= 1e-6 * size, (isa, rounding)


@pytest.fixture(params=HERE, ids=lambda number: library.ISAS[number])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    return request.param


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_block_type(kind: str) -> None:
    for rows, out, columns in ((1, 90, 768), (3, 16, 256), (5, 33, 256), (40, 17, 1280)):
        blocks = synthetic_blocks("blk.0.ffn_up.weight", kind, (out, columns))
        floats = quants.dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float64)
        check(from_blocks(kind, blocks, np.asarray), floats, rows, rows)


@pytest.mark.parametrize("bits", LAYOUTS)
@pytest.mark.parametrize("form", ["symmetric", "minimum", "zero"])
def test_every_affine_array(bits: int, form: str) -> None:
    sizes = ((1, 5, 16, 16), (2, 33, 32, 32), (4, 16, 48, 16), (7, 40, 128, 64), (13, 15, 384, 128), (26, 31, 96, 96))
    for seed, (rows, out, columns, group) in enumerate(sizes):
        array = affine(bits, group, form, out, columns, seed)
        check(array, by_definition(array), rows, seed)


@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["symmetric", "minimum", "zero"]),
    st.integers(1, 70),
    st.integers(1, 6),
    st.integers(1, 30),
)
@settings(max_examples=30)
def test_any_affine_array(bits: int, group: int, form: str, out: int, groups: int, rows: int) -> None:
    array = affine(bits, group, form, out, group * groups, rows)
    check(array, by_definition(array), rows, rows)


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("int8", [False, True])
def test_threads_and_order_change_no_bit(rows: int, int8: bool, isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, this order or the other, and XLA's pool: the same bits."""
    monkeypatch.setattr(matmul, "isa_number", lambda: isa)
    array = from_blocks("Q4_0", synthetic_blocks("blk.0.ffn_up.weight", "Q4_0", (700, 512)), np.asarray)
    x = np.random.default_rng(0).standard_normal((rows, 512)).astype(np.float32)
    held = to_lanes(array)
    planes, scale = held.inner.planes[0], held.inner.scale
    w = library.Weight(700, 512, 32, 1, (4, 0), 8, 0, 0)
    w.plane[0], w.scale = planes.ctypes.data, scale.ctypes.data
    kernels = library.library()

    def run(parallel: Any) -> np.ndarray:
        y = np.full((rows, 700), np.nan, np.float32)
        out = (ctypes.c_void_p * 1)(y.ctypes.data)
        given = library.Input(x=x.ctypes.data, m=rows, rounding=int8)
        assert kernels.qjax_matmul(ctypes.byref(w), 1, ctypes.byref(given), out, isa, parallel, None) == 0
        return y

    @library.Parallel
    def backwards(_: Any, count: int, task: Any, arg: Any) -> None:
        for i in reversed(range(count)):
            task(arg, i)

    alone = run(library.Parallel())
    np.testing.assert_array_equal(run(backwards), alone)
    (pool,) = matmul._call(jnp.asarray(x), (jax.tree.map(jnp.asarray, held),), rounding="groups" if int8 else "none")
    np.testing.assert_array_equal(pool, alone)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """As long as as many rows are few, or many."""
    w = jax.tree.map(jnp.asarray, to_lanes(affine(4, 32, "minimum", 50, 256, 0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((30, 256)), jnp.float32)
    for rounding in ("none", "groups"):
        (many,) = matmul._call(x, (w,), rounding=rounding)
        np.testing.assert_array_equal(matmul._call(x[:20], (w,), rounding=rounding)[0], many[:20])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dense_floats(dtype: Any, isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "isa_number", lambda: isa)
    rng = np.random.default_rng(0)
    for rows, out, columns in ((1, 7, 5), (3, 90, 100), (8, 33, 64)):
        w = jnp.asarray(rng.standard_normal((out, columns)), dtype)
        x = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
        wanted = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.float32), np.float64).T
        np.testing.assert_allclose(matmul._call_dense(x, (w,))[0], wanted, atol=2e-5)


def attention_in_float64(q: Any, k: Any, v: Any, positions: Any, window: int | None) -> np.ndarray:
    q, k, v = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, k, v))
    group = q.shape[2] // k.shape[1]
    scores = np.einsum("bqhd,bhsd->bhqs", q, np.repeat(k, group, 1)) / np.sqrt(q.shape[3])
    slot, last = np.arange(k.shape[2]), np.asarray(positions)[:, None, :, None]
    seen = (slot <= last) & (slot > (-1 if window is None else last - window))
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True, where=seen, initial=-np.inf)), 0)
    return np.einsum("bhqs,bhsd->bqhd", weights / weights.sum(-1, keepdims=True), np.repeat(v, group, 1))


@partial(jax.jit, static_argnums=0)
def attended(window: int, q: Any, k: Any, v: Any, positions: Any) -> dict[str, jax.Array]:
    """By every instruction set of this CPU."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for isa in HERE:
            monkeypatch.setattr(call, "isa_number", lambda isa=isa: isa)
            attributes = (("window", np.int64(window)),)
            found[library.ISAS[isa]] = call._call(library.ATTENTION_TARGET, attributes, q, k, v, positions)
    return found


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("window", [None, 1, 33])
def test_attention(dtype: Any, window: int | None) -> None:
    rng = np.random.default_rng(0)
    for batch, seq, heads, kv_heads, slots, dim in (
        (1, 1, 4, 4, 70, 64),
        (2, 5, 8, 2, 100, 32),
        (1, 70, 6, 1, 200, 80),
    ):
        make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        q = 3 * make(batch, seq, heads, dim)
        k, v = make(batch, kv_heads, slots, dim).astype(dtype), make(batch, kv_heads, slots, dim).astype(dtype)
        start = rng.integers(0, slots - seq + 1, (batch, 1))
        positions = jnp.asarray(start + np.arange(seq), jnp.int32)
        wanted = attention_in_float64(q, k, v, positions, window)
        found = attended(window or 0, q, k, v, positions)
        assert len(found) == len(HERE)
        for isa, ours in found.items():
            np.testing.assert_allclose(ours, wanted, atol=1e-5, err_msg=isa)


def test_attention_sees_what_is_not_finite_and_nothing_behind_it() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 4, 2, 16)), jnp.float32) for _ in range(3))
    k, v = (jnp.moveaxis(jnp.tile(a, (1, 20, 1, 1)), 1, 2) for a in (k, v))
    positions = jnp.arange(70, 74, dtype=jnp.int32)[None]
    clean = attend(q, k, v, positions, None)
    np.testing.assert_array_equal(attend(q, k, v.at[:, :, 74:].set(jnp.nan), positions, None), clean)
    broken = np.asarray(attend(q, k.at[:, :, 72].set(jnp.nan), v, positions, None))
    assert np.isfinite(broken[:, :2]).all()
    assert np.isnan(broken[:, 2:]).all()
