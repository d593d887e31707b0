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


def error(W: Any, H: Any, array: Any) -> float:
    """Squared error of the products."""
    difference = np.asarray(array.dequantize() - W, np.float64)
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
        (Scheme(4, 16, symmetric=False), True, False, 32),
        (Scheme(3, 32), False, False, 32),
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
