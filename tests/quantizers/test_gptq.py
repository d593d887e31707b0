"""GPTQ against a plain transcription of the published algorithm, and the laws that it is to keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import Scheme, TransformedArray
from qjax.arrays.scheme import codes_of
from qjax.quantizers.gptq import gptq
from qjax.quantizers.rtn import rtn


def layer(seed: int, out: int = 24, columns: int = 64, tokens: int = 256) -> tuple[Any, Any]:
    """Weights, and second moments of inputs that go together and differ in size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=columns))
    x = (rng.normal(size=(tokens, columns)) @ mix).astype(np.float32)
    return jnp.asarray(rng.normal(size=(out, columns)).astype(np.float32)), jnp.asarray(2 / tokens * x.T @ x)


@jax.jit
def floats(array: Any) -> Any:
    return array.dequantize()


def error(W: Any, H: Any, array: Any) -> float:
    """Squared error of the products."""
    difference = np.asarray(floats(array), np.float64) - np.asarray(W, np.float64)
    return float(np.einsum("oi,ij,oj->", difference, np.asarray(H, np.float64), difference))


def published(
    W: np.ndarray,
    H: np.ndarray,
    scheme: Scheme,
    *,
    act_order: bool,
    static_groups: bool,
    blocksize: int,
    percdamp: float,
) -> np.ndarray:
    """Codes, in the order of the columns: Algorithm 1 of the paper, act-order and groups as the authors' code has them.

    Float64, one weight at a time; scales are rounded to float16, and a group that begins within a block is fitted to
    the weights of that moment.
    """
    W, H = W.astype(np.float64).copy(), H.astype(np.float64)
    rows, columns = W.shape
    size = columns if scheme.group_size <= 0 else scheme.group_size

    def find_params(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
        if scheme.symmetric:
            scale = (2 * np.maximum(-low, high) / scheme.max_code).astype(np.float16).astype(np.float64)
            return scale, np.full(rows, scheme.middle)
        scale = ((high - low) / scheme.max_code).astype(np.float16).astype(np.float64)
        return scale, np.round(-low / scale)

    groups = [find_params(W[:, i : i + size]) for i in range(0, columns, size)]
    perm = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(columns)
    W, H = W[:, perm], H[perm][:, perm]
    H = H + percdamp * np.mean(np.diag(H)) * np.eye(columns)
    Hinv = np.linalg.cholesky(np.linalg.inv(H)).T
    codes = np.zeros((rows, columns))
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        Err1 = np.zeros((rows, i2 - i1))
        for i in range(i1, i2):
            if static_groups:
                scale, zero = groups[perm[i] // size]
            elif i % size == 0:
                scale, zero = find_params(W[:, i : i + size])
            code = np.clip(np.round(W[:, i] / scale) + zero, 0, scheme.max_code)
            codes[:, i] = code
            err = (W[:, i] - scale * (code - zero)) / Hinv[i, i]
            W[:, i:i2] -= np.outer(err, Hinv[i, i:i2])
            Err1[:, i - i1] = err
        W[:, i2:] -= Err1 @ Hinv[i1:i2, i2:]
    made = np.zeros((rows, columns), np.uint8)
    made[:, perm] = codes
    return made


@pytest.mark.parametrize(
    ("scheme", "act_order", "static_groups", "blocksize"),
    [
        (Scheme(4, 16), True, True, 32),
        pytest.param(Scheme(4, 16, symmetric=False), True, False, 32, marks=pytest.mark.slow),
        pytest.param(Scheme(3, 32), False, False, 32, marks=pytest.mark.slow),
        (Scheme(2, 32, symmetric=False), False, True, 48),
        (Scheme(8, -1), True, False, 128),
    ],
)
def test_codes_are_those_of_the_published_algorithm(
    scheme: Scheme, act_order: bool, static_groups: bool, blocksize: int
) -> None:
    """But for weights that lie between two codes, and what follows from these."""
    same = []
    for seed in range(3):
        W, H = layer(seed)
        options = {"act_order": act_order, "static_groups": static_groups}
        array = gptq(W, H, scheme, block_size=blocksize, **options).array
        order = np.arange(64)
        if isinstance(array, TransformedArray):
            order, array = np.asarray(array.columns), array.inner
        codes = np.zeros((24, 64), np.uint8)
        codes[:, order] = codes_of(array)
        true = published(np.asarray(W), np.asarray(H), scheme, blocksize=blocksize, percdamp=0.01, **options)
        same.append((codes == true).mean())
    assert np.mean(same) > 0.995


def test_gptq_has_the_worse_weights_and_the_better_products() -> None:
    for seed in range(4):
        W, H = layer(seed)
        ours, nearest = gptq(W, H, Scheme(3, 32)).array, rtn(W, Scheme(3, 32))
        assert error(W, H, ours) < 0.8 * error(W, H, nearest)
        assert error(W, jnp.eye(64), ours) > error(W, jnp.eye(64), nearest)


def test_act_order_lowers_the_mean_error_of_the_products() -> None:
    pairs = []
    for seed in range(30):
        W, H = layer(seed)
        pairs.append([error(W, H, gptq(W, H, Scheme(3, 32), act_order=order).array) for order in (False, True)])
    plain, ordered = np.transpose(pairs)
    assert np.mean(np.log(ordered / plain)) < -0.05


def test_searched_grids_lower_the_error_of_the_products() -> None:
    pairs = []
    for seed in range(4):
        W, H = layer(seed)
        pairs.append([error(W, H, gptq(W, H, Scheme(2, 32), mse=mse).array) for mse in (False, True)])
    assert np.mean(np.log(np.divide(*np.transpose(pairs)))) > 0.2


@pytest.mark.parametrize("static_groups", [True, False])
def test_layers_side_by_side_are_those_one_by_one(static_groups: bool) -> None:
    """But for what a sum's order does to weights between two codes."""
    Ws, Hs = (jnp.stack(parts) for parts in zip(*(layer(seed) for seed in range(3)), strict=True))
    scheme = Scheme(4, 32, symmetric=False)
    together = gptq(Ws[None], Hs[None], scheme, static_groups=static_groups).array
    assert together.shape == (1, *Ws.shape)
    for i in range(3):
        alone = gptq(Ws[i], Hs[i], scheme, static_groups=static_groups).array
        mine, inner = alone, jax.tree.map(lambda leaf, i=i: leaf[0, i], together)
        if not static_groups:
            assert isinstance(mine, TransformedArray)
            np.testing.assert_array_equal(inner.columns, mine.columns)
        assert (np.asarray(floats(inner)) == np.asarray(floats(mine))).mean() > 0.98


def test_scales_are_those_that_codes_were_made_with() -> None:
    """Stored is used: where no error is handed on, each weight is within half a step of its own."""
    W, _ = layer(0)
    array = gptq(W, jnp.eye(64), Scheme(4, 32, symmetric=False)).array
    assert array.scale.dtype == jnp.float16
    np.testing.assert_array_equal(codes_of(array), codes_of(rtn(W, Scheme(4, 32, symmetric=False))))


def test_groups_are_refitted_to_what_was_handed_on() -> None:
    """With groups that are a part of a block."""
    W, H = layer(1)
    static, refitted = (
        gptq(W, H, Scheme(3, 32), act_order=False, static_groups=static).array for static in (True, False)
    )
    np.testing.assert_array_equal(refitted.scale[:, 0], static.scale[:, 0])
    assert (np.asarray(refitted.scale[:, 1:]) != np.asarray(static.scale[:, 1:])).mean() > 0.5


def test_dead_columns_are_rounded_to_nearest() -> None:
    """And the others as if these were not there."""
    W, H = layer(2)
    dead = np.zeros(64, bool)
    dead[[3, 17, 63]] = True
    H = jnp.where(dead[:, None] | dead[None], 0, H)
    scheme = Scheme(4, 32)
    array = gptq(W, H, scheme).array
    nearest = rtn(W, scheme)
    np.testing.assert_array_equal(array.scale, nearest.scale)
    np.testing.assert_array_equal(codes_of(array)[:, dead], codes_of(nearest)[:, dead])
    assert (np.asarray(codes_of(array)) != np.asarray(codes_of(nearest)))[:, ~dead].mean() > 0.1
    np.testing.assert_array_equal(codes_of(gptq(W, 0 * H, scheme).array), codes_of(nearest))


def test_damping_grows_where_cholesky_fails() -> None:
    W, H = layer(3)
    assert gptq(W, H, Scheme(4, 32)).damp == jnp.float32(0.01)
    # As much below zero as a tenth of the mean.
    values, vectors = np.linalg.eigh(np.asarray(H, np.float64))
    values[0] = -0.02 * values.mean()
    indefinite = jnp.asarray(((vectors * values) @ vectors.T).astype(np.float32))
    found = gptq(W, indefinite, Scheme(4, 32))
    assert found.damp == pytest.approx(0.1)
    assert error(W, H, found.array) < error(W, H, rtn(W, Scheme(4, 32)))
    assert gptq(W, indefinite, Scheme(4, 32), damp=0.0).damp > 0


def test_the_program_does_not_grow_with_the_columns() -> None:
    def size(columns: int) -> int:
        spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return len(gptq.lower(spec(16, columns), spec(columns, columns), Scheme(4, 32)).as_text().splitlines())

    assert size(4096) <= size(512)
