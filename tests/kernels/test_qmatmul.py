"""Every kernel against the reference, its memory, its shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from qjax.arrays import partition
from qjax.evaluate.synthetic import synthetic_blocks
from qjax.formats.gguf import from_blocks
from qjax.formats.gguf.arrays import BLOCK_TYPES
from qjax.kernels import KERNELS, explain, native, qmatmul, qtake, select
from qjax.kernels.int8 import matmul_int8_few, matmul_int8_many, quantize_activations
from qjax.kernels.reference import matmul_reference
from qjax.kernels.tiles import matmul_tiles, tile_rows

GROUPED = sorted(BLOCK_TYPES)
TYPES = [*GROUPED, "IQ2_XXS", "TQ2_0", "F32", "F16", "BF16"]
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def weight(kind: str, rows: int = 72, columns: int = 512, seed: int = 0) -> object:
    return from_blocks(kind, synthetic_blocks(f"blk.{seed}.ffn_up.weight", kind, (rows, columns)))


def inputs(rows: int, columns: int = 512, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, columns)), jnp.float32)


def error(ours: jax.Array, theirs: jax.Array) -> float:
    """Largest difference over the largest value."""
    return float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))


@pytest.mark.parametrize("kind", TYPES)
def test_qmatmul_is_dequantize_then_matmul(kind: str) -> None:
    w = weight(kind)
    for rows in (1, 5, 33):
        x = inputs(rows)
        assert error(qmatmul(x, w), matmul_reference(x, w)) < 2e-6, explain(w, rows)


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_kernels_agree(kind: str, rows: int) -> None:
    """One rounding of x, three ways to multiply; and it costs about one percent."""
    w, x = weight(kind), inputs(rows)
    few, many = jax.jit(matmul_int8_few)(x, w), jax.jit(matmul_int8_many)(x, w)
    assert error(many, few) < 2e-6
    assert error(qmatmul(x, w, activations="int8"), few) < 2e-6
    assert error(few, matmul_reference(x, w)) < 0.015


@needs_native
@given(
    st.sampled_from(GROUPED),
    st.sampled_from([(1, 1, 256), (2, 90, 768), (8, 33, 1280), (1, 300, 2304)]),
    st.booleans(),
    st.integers(0, 999),
)
@settings(max_examples=16)
def test_native_kernel_at_any_size(kind: str, size: tuple[int, int, int], int8: bool, seed: int) -> None:
    rows, out, columns = size
    w, x = weight(kind, out, columns, seed), inputs(rows, columns, seed)
    elsewhere = matmul_int8_few if int8 else matmul_tiles
    ours = native.matmul_native(x, w, int8=int8, elsewhere=elsewhere)
    assert error(ours, elsewhere(x, w)) < 5e-6


@needs_native
def test_native_kernel_of_hostile_numbers() -> None:
    """Zeros quantize to zeros; infinities and NaN stay in their row."""
    w = weight("Q4_0")
    x = jnp.zeros((2, 512), jnp.float32).at[1, 3].set(jnp.inf)
    y = qmatmul(x, w)
    np.testing.assert_array_equal(y[0], np.zeros(72))
    assert not np.isfinite(np.asarray(y[1])).any()
    np.testing.assert_array_equal(qmatmul(x[:1], w, activations="int8"), np.zeros((1, 72)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K"])
def test_nan_is_not_rounded_away(kind: str) -> None:
    x = inputs(2).at[1, 3].set(jnp.nan)
    y = np.asarray(qmatmul(x, weight(kind), activations="int8"))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
@pytest.mark.parametrize("which", ["all", "minimum"])
def test_scales_of_another_dtype(kind: str, which: str) -> None:
    """A cast of the scales changes the kernel, not the result."""
    w = weight(kind)
    cast = lambda a: a.astype(jnp.float32) if a.dtype == jnp.float16 else a
    if which == "all":
        w = jax.tree.map(cast, w)
    elif getattr(w, "minimum", None) is not None:
        w = w.replace(minimum=cast(w.minimum))
    x = inputs(1)
    assert error(qmatmul(x, w), matmul_reference(x, w)) < 2e-6


def test_calls_outside_of_jit_compile_once() -> None:
    w = weight("Q4_K")
    for rows in (1, 16):
        x = inputs(rows)
        qmatmul(x, w)
        w.dequantize()
        compiled: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, _, into=compiled, **__: into.append(event) if "backend_compile" in event else None
        )
        qmatmul(x, w)
        w.dequantize()
        assert compiled == []


def test_unknown_activations_are_refused() -> None:
    # A ValueError; here the annotation is checked before.
    with pytest.raises(Exception, match="INT8"):
        qmatmul(inputs(1), weight("Q4_0"), activations="INT8")


@pytest.mark.parametrize("out", [1, 7, 8, 9, 129, 515, 700])
@pytest.mark.parametrize("rows", [1, 64])
def test_tiles_cover_any_number_of_rows(out: int, rows: int) -> None:
    w, x = weight("Q8_0", out, 256), inputs(rows, 256)
    assert error(matmul_tiles(x, w), matmul_reference(x, w)) < 2e-6


def temporaries(run: object, *args: object) -> int:
    return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "F16", "BF16"])
@pytest.mark.parametrize("rows", [1, 512])
def test_no_float_copy_of_the_weight(kind: str, rows: int) -> None:
    """What the compiled product holds beside its arguments is a fraction of the weight's floats."""
    w = weight(kind, 4096, 2048)
    floats = 4 * 4096 * 2048
    for run in (qmatmul, matmul_tiles):
        # For many rows, x and y themselves are held in other orders.
        allowance = 2 * 4 * rows * (4096 + 2048) if rows > 1 else 0
        if kind == "BF16" and (run is matmul_tiles or rows > 1):
            # XLA:CPU has no bfloat16: it copies the bits (not the floats) before it slices them.
            allowance += floats // 2
        assert temporaries(run, inputs(rows, 2048), w) <= floats // 4 + allowance
    if rows == 1 and kind != "F16":
        assert temporaries(matmul_reference, inputs(rows, 2048), w) >= floats, "the test can tell"


def test_tiles_are_never_most_of_a_weight() -> None:
    for shape in ((256, 256), (2048, 5632), (151936, 896), (4096, 14336), (32, 16384)):
        for rows in (1, 512):
            assert 1 <= tile_rows(rows, shape) <= max(8, shape[0] // 4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ4_XS", "IQ2_XXS"])
@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_sharded_weights_are_never_gathered(kind: str, side: str, activations: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    w = weight(kind, 64, 1024)
    cut = partition(w, mesh, "tp", side)
    for rows in (1, 40):
        x = inputs(rows, 1024)
        run = jax.jit(partial(qmatmul, activations=activations))
        assert error(run(x, cut), qmatmul(x, w, activations=activations)) < 2e-6
        program = run.lower(x, cut).compile().as_text()
        assert "all-gather" not in program
        assert ("all-reduce" in program) == (side == "in")


def test_stacked_weights_under_vmap_and_scan() -> None:
    """Stacked experts or layers: a leading axis on every leaf."""
    one, two = weight("Q4_K"), weight("Q4_K", seed=1)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    x = inputs(3)
    both = jax.jit(jax.vmap(qmatmul, in_axes=(None, 0)))(x, stacked)
    _, scanned = jax.lax.scan(lambda c, w: (c, qmatmul(x, w)), 0, stacked)
    for i, w in enumerate((one, two)):
        assert error(both[i], matmul_reference(x, w)) < 2e-6
        assert error(scanned[i], matmul_reference(x, w)) < 2e-6


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ2_XXS"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_gradients_are_those_of_the_floats(kind: str, rows: int, activations: str) -> None:
    """The rounding of activations is differentiated straight through."""
    w, x, up = weight(kind), inputs(rows), inputs(rows, 72, seed=1)
    ours = jax.jit(jax.grad(lambda x: jnp.sum(up * qmatmul(x, w, activations=activations))))(x)
    theirs = jax.grad(lambda x: jnp.sum(up * matmul_reference(x, w)))(x)
    assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_scales_can_be_learned(activations: str) -> None:
    """The derivative by a float16 scale is the sum over its group, though its conversion is integer arithmetic."""
    w, x = weight("Q4_0"), inputs(2)
    product = lambda scale: jnp.sum(qmatmul(x, w.replace(scale=scale), activations=activations))
    grads = jax.grad(product)(w.scale)
    codes = np.asarray(w.codes(), np.float32).reshape(72, 16, 32)
    expected = (codes * np.asarray(x).sum(0).reshape(16, 32)).sum(-1)
    np.testing.assert_allclose(np.asarray(grads, np.float32), expected, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("kind", [k for k in TYPES if k != "F32"])
def test_qtake_gives_rows_of_the_table(kind: str) -> None:
    w = weight(kind)
    ids = jnp.array([[0, 71], [5, 5]])
    whole = w.dequantize() if hasattr(w, "dequantize") else w.astype(jnp.float32)
    np.testing.assert_array_equal(jax.jit(qtake)(w, ids), np.asarray(whole)[np.asarray(ids)])
    assert qtake(w, ids, jnp.bfloat16).dtype == jnp.bfloat16


def test_qtake_dequantizes_rows_only() -> None:
    table = weight("Q6_K", 32768, 256)
    ids = jnp.zeros((1, 4), jnp.int32)
    assert temporaries(qtake, table, ids) < 32768 * 256 * 4 // 100


def test_the_choice_can_be_asked_for() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert select(weight("F32"), 1).name == "xla-dot"
    assert select(weight("Q4_0"), 512).name == "xla-tiles"
    assert select(weight("IQ2_XXS"), 1).name == "xla-tiles"
    assert explain(weight("Q4_K"), 64).startswith("xla-tiles: 64 rows x TwoLevelArray(72x512")
    expected = "native" if native.available() else "xla-tiles"
    assert select(weight("Q4_0"), 1).name == expected


def test_mismatched_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected x with 512 columns"):
        qmatmul(inputs(1, 256), weight("Q4_0"))


def test_activations_are_rounded_to_the_nearest_of_255_steps() -> None:
    x = inputs(4)
    q, scale = quantize_activations(x, 32)
    assert q.dtype == jnp.int8
    assert int(jnp.max(jnp.abs(q.astype(jnp.int32)))) == 127
    back = (q.astype(jnp.float32) * scale[..., None]).reshape(x.shape)
    assert float(jnp.max(jnp.abs(back - x) / jnp.repeat(scale, 32, axis=1))) <= 0.5 + 1e-4
    assert qmatmul(x.astype(jnp.bfloat16), weight("Q4_0")).dtype == jnp.bfloat16
