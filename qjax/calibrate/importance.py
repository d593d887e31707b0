"""Importance: the mean square of what each column of a weight is multiplied with, over a text.

The error of a product y = W x when W is rounded to W + D is E |D x|^2, for inputs whose columns are uncorrelated
sum_j E[x_j^2] |D_j|^2: the columns' mean squares say where rounding hurts. What is counted, and under which names, is
as in llama.cpp's tools/imatrix.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from qjax.calibrate.walk import walk
from qjax.errors import QjaxError
from qjax.formats.gguf.imatrix import Importances
from qjax.kernels import Activations
from qjax.models import ModelConfig


def importance(
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks n_ctx"],
    *,
    output: bool = False,
    batch: int = 1,
    activations: Activations = "float",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importances:
    """Importances of the weights of a model's layers on a text.

    Args:
      params: float or packed weights, as `forward` takes them.
      chunks: token ids as the model shall see them, BOS included: `models.chunks.chunks_of` and `begun`.
      output: of the output matrix too (token_embd.weight where the model has no other).
      batch: chunks that are run at once.
      progress: called as (chunks done, chunks).

    Returns:
      float64 sums and counts by each weight's name in a GGUF file; `write_imatrix` takes them, `.of` are the means.

    Raises:
      QjaxError: no chunk, or inputs of a weight that are not finite.

    Examples:
      >>> ids = model.encode(text)
      >>> cut = chunks_of(model.config, ids, n_ctx=512, bos_id=model.tokenizer.bos_id, chunks=None)
      >>> found = importance(model.params, model.config, begun(cut, model.tokenizer.bos_id))
      >>> write_imatrix("imatrix.gguf", found)
    """
    if not len(chunks):
        raise QjaxError("expected at least one chunk of text")
    found = none_yet = nothing(chunks.shape[1])
    for found in accumulate(params, config, chunks, none_yet, output=output, batch=batch, activations=activations):
        progress(found.chunks, len(chunks))
    return found


def nothing(n_ctx: int, datasets: tuple[str, ...] = ()) -> Importances:
    """The importances of no text yet, to be cut into chunks of n_ctx tokens."""
    return Importances({}, {}, 0, n_ctx, datasets)


def accumulate(
    params: dict[str, Any],
    config: ModelConfig,
    chunks: Int32[np.ndarray, "chunks n_ctx"],
    found: Importances,
    *,
    output: bool = False,
    batch: int = 1,
    activations: Activations = "float",
) -> Iterator[Importances]:
    """Go on from what was found in the first `found.chunks` chunks; yields what is found so far, after each batch.

    What was yielded is not changed later. Going on from it gives, to the last bit, what an undisturbed run gives: sums
    are of float32 within a chunk and of float64, chunk by chunk, over them.

    Raises:
      QjaxError: see `importance`.
    """
    for start in range(found.chunks, len(chunks), batch):
        some = chunks[start : start + batch]
        tapped = walk(params, config, jnp.asarray(some), squares, output=output, activations=activations)
        # All of a batch is under way before the first result is waited for.
        kept = jax.device_get(list(tapped))
        found = _added(found, kept, len(some))
        yield found


def squares(names: tuple[str, ...], x: Float[Array, "batch seq n"]) -> Float32[Array, "batch n"]:
    """The tap: of each chunk the sum of the squares in each column."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)


def _added(found: Importances, kept: list[tuple[tuple[str, ...], Any]], chunks: int) -> Importances:
    """`kept`: by names, float32 [chunks, n] of the chunks that come next."""
    sums: dict[str, np.ndarray] = {}
    for names, rows in kept:
        if not np.isfinite(rows).all():
            raise QjaxError(f"{names[0]}: what it is multiplied with is not finite: weights before it are damaged")
        total = found.sums.get(names[0], np.zeros(rows.shape[1], np.float64))
        for row in rows:
            total = total + row
        sums |= dict.fromkeys(names, total)
    done = found.chunks + chunks
    counts = dict.fromkeys(sums, np.array(float(done * found.chunk_size)))
    return found._replace(sums=sums, counts=counts, chunks=done)
