"""How much a change of each weight changes what a model predicts: the diagonal of its Fisher information.

To second order a change dW of the weights costs a KL divergence of 1/2 dW^T F dW to the model as it was, where F is the
mean of G G^T over gradients G = d log p(y) / dW at next tokens y that are drawn from the model's own predictions (Amari
1998; Martens 2020, "New insights and perspectives on the natural gradient method"). Of F the diagonal is kept, which is
all that counts for rounding errors that are independent of one another, and of a matrix' diagonal its sums along rows
and columns: F[o, i] ~ rows[o] columns[i] / sum(rows) (as Adafactor keeps second moments; Shazeer & Stern 2018).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, PRNGKeyArray

from qjax.arrays import QuantizedArray
from qjax.calibrate.importance import nothing
from qjax.errors import QjaxError
from qjax.formats.gguf.imatrix import Importances
from qjax.kernels import rms_norm
from qjax.models import ModelConfig
from qjax.models.forward import begin, layer
from qjax.models.load import MATRICES


class Fisher(NamedTuple):
    """Of one matrix [out, in], a token: the sums of F's diagonal along its rows and its columns."""

    rows: Float64[np.ndarray, " out"]
    columns: Float64[np.ndarray, " in"]


def divergence_of(
    fisher: Fisher, error: Float[Array | np.ndarray, "rows in"], at: Int[np.ndarray, " rows"] | None = None
) -> float:
    """The KL divergence, in nats a token, that this error of a matrix is expected to cost.

    Args:
      error: quantized less true weights, of all rows, or of those that `at` names.
      at: rows drawn in proportion to `fisher.rows`, with repetition.
    """
    columns = jnp.asarray(fisher.columns, jnp.float32)
    per_row = np.asarray((jnp.square(jnp.asarray(error, jnp.float32)) * columns[None]).sum(-1), np.float64)
    total = float(fisher.rows.sum())
    if not total:
        return 0.0
    mean = float(per_row.mean()) if at is not None else float(fisher.rows @ per_row) / total
    return 0.5 * mean


def _float32(weight: Any) -> Float32[Array, "out in"]:
    return weight.dequantize() if isinstance(weight, QuantizedArray) else weight.astype(jnp.float32)


def _marginals(gradient: Float32[Array, "out in"]) -> tuple[Any, Any]:
    square = jnp.square(gradient)
    return square.sum(1), square.sum(0)


@partial(jax.jit, static_argnames="config")
def _through_layer(p: Any, x: Any, dy: Any, angles: Any, positions: Any, *, config: ModelConfig) -> Any:
    """Gradient of a layer's input, and the marginals of each of its matrices."""
    rest = {name: value for name, value in p.items() if name not in MATRICES}

    def run(weights: Any, x: Any) -> Any:
        return layer(rest | weights, x, angles, positions, None, config=config)[0]

    _, pull = jax.vjp(run, {name: _float32(p[name]) for name in MATRICES}, x)
    gradients, dx = pull(dy)
    return dx, {name: _marginals(gradient) for name, gradient in gradients.items()}


@partial(jax.jit, static_argnames="config")
def _through_head(ends: Any, x: Float32[Array, "1 seq hidden"], key: PRNGKeyArray, *, config: ModelConfig) -> Any:
    """Draws the next tokens; gradient of the last layer's output, and the output matrix' marginals."""
    weight = _float32(ends.get("output", ends["token_embd"]))
    normed, pull = jax.vjp(lambda x: rms_norm(x, ends["output_norm"], config.norm_eps), x)
    h = normed[0]
    logits = h @ weight.T
    drawn = jax.random.categorical(key, logits)
    d = jax.nn.one_hot(drawn, weight.shape[0], dtype=jnp.float32) - jax.nn.softmax(logits)
    # The gradient is d^T h, [vocab, hidden]; the sums of its squares need only the products of positions.
    rows = (d * ((h @ h.T) @ d)).sum(0)
    columns = (h * ((d @ d.T) @ h)).sum(0)
    return pull((d @ weight)[None])[0], (rows, columns)


def fisher(
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks seq"],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importances:
    """The Fisher information of every matrix, by its name in a GGUF file: sums over the tokens of the chunks.

    One chunk at a time: its layers' inputs are held, and of one layer the weights and their gradients in float32.

    Args:
      params, config: of a float model (a packed one is dequantized layer by layer).
      chunks: token ids, each chunk a text of its own; a few thousand tokens are enough.
      seed: of the tokens that are drawn.
      progress: called as (chunks done, chunks).

    Returns:
      Importances with rows: `write_imatrix` takes them, encoders weight errors by the columns, llama.cpp's too.

    Raises:
      QjaxError: no chunk, or gradients that are not finite.
    """
    if not chunks.size:
        raise QjaxError("expected at least one chunk of tokens")
    found = none_yet = nothing(chunks.shape[1])
    for found in accumulate(params, config, chunks, none_yet, seed=seed):
        progress(found.chunks, len(chunks))
    return found


def accumulate(
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks seq"],
    found: Importances,
    *,
    seed: int = 0,
) -> Iterator[Importances]:
    """Go on from what was found in the first `found.chunks` chunks; yields what is found so far, after each.

    Raises:
      QjaxError: see `fisher`.
    """
    for i in range(found.chunks, len(chunks)):
        columns, rows = dict(found.sums), dict(found.row_sums)
        for name, of_rows, of_columns in _of_chunk(params, config, chunks[i], jax.random.key(seed + i)):
            if not np.isfinite(of_columns).all():
                raise QjaxError(f"{name}: its gradient is not finite: weights are damaged")
            rows[name] = rows.get(name, 0.0) + np.asarray(of_rows, np.float64)
            columns[name] = columns.get(name, 0.0) + np.asarray(of_columns, np.float64)
        counts = dict.fromkeys(columns, np.array(float((i + 1) * found.chunk_size)))
        found = found._replace(sums=columns, counts=counts, chunks=i + 1, row_sums=rows)
        yield found


def each(found: Importances) -> dict[str, Fisher]:
    """The Fisher information of each matrix, a token; empty of importances that are none."""
    return {
        name: Fisher(*(sums.astype(np.float64) / float(found.counts[name]) for sums in (rows, found.sums[name])))
        for name, rows in found.row_sums.items()
    }


def _of_chunk(
    params: dict[str, Any], config: ModelConfig, chunk: Int32[np.ndarray, " seq"], key: PRNGKeyArray
) -> Iterator[tuple[str, Any, Any]]:
    """(name, sums along rows, sums along columns); a matrix that serves at both ends comes twice."""
    tokens = jnp.asarray(chunk)[None]
    x, angles, positions = begin(params, tokens, jnp.zeros(1, jnp.int32))
    inputs = [x]
    for p in params["layers"]:
        inputs.append(layer(p, inputs[-1], angles, positions, None, config=config)[0])
    ends = {name: params[name] for name in ("token_embd", "output", "output_norm") if name in params}
    dx, found = _through_head(ends, inputs.pop(), key, config=config)
    yield ("output.weight" if "output" in params else "token_embd.weight"), *found
    for i in reversed(range(config.layers)):
        dx, of_layer = _through_layer(params["layers"][i], inputs.pop(), dx, angles, positions, config=config)
        for name, found in of_layer.items():
            yield f"blk.{i}.{name}.weight", *found
    # Of the embedding only the rows of tokens that are there have a gradient.
    seen, at = np.unique(chunk, return_inverse=True)
    gradient = np.zeros((seen.size, config.hidden), np.float64)
    np.add.at(gradient, at, np.asarray(dx[0], np.float64))
    rows = np.zeros(config.vocab)
    rows[seen] = np.square(gradient).sum(1)
    yield "token_embd.weight", rows, np.square(gradient).sum(0)


def drawn_rows(fisher: Fisher, count: int, seed: int = 0) -> Int[np.ndarray, " count"]:
    """So many rows, drawn in proportion to `fisher.rows`, for `divergence_of`; sorted."""
    share = fisher.rows / fisher.rows.sum()
    return np.sort(np.random.default_rng(seed).choice(share.size, count, p=share))
