"""A text's tokens in chunks of one context each, as llama.cpp's tools (llama-perplexity, llama-imatrix) cut them.

Chunks do not overlap, and the first token of each is replaced by BOS where the model adds one.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from qjax.errors import QjaxError
from qjax.models.config import ModelConfig


def chunks_of(
    config: ModelConfig, ids: Sequence[int] | np.ndarray, *, n_ctx: int, bos_id: int | None, chunks: int | None
) -> Int32[np.ndarray, "chunks n_ctx"]:
    """The chunks of a text that are looked at; their first tokens are not replaced yet (see `begun`).

    Args:
      ids: the whole text, tokenized at once, with BOS in front where the model adds one.
      n_ctx: tokens of a chunk, at least 8 and even.
      bos_id: what will stand first in each chunk; None where the model adds no BOS.
      chunks: only this many; None for all.

    Raises:
      QjaxError: the text is shorter than one chunk, n_ctx is odd or out of range, or an id is not in the vocabulary.
    """
    if n_ctx < 8 or n_ctx % 2 or n_ctx > config.context:
        raise QjaxError(f"expected an even context from 8 to the model's {config.context}, got {n_ctx}")
    wide = np.asarray(ids, np.int64)
    tokens = checked_ids(config, wide if bos_id is None else np.append(wide, bos_id))[: len(wide)]
    available = len(tokens) // n_ctx
    if available < 1:
        raise QjaxError(f"the text has {len(tokens)} tokens, fewer than one chunk of {n_ctx}: give a longer one")
    if chunks is not None and chunks < 1:
        raise QjaxError(f"expected at least one chunk, got {chunks}")
    count = available if chunks is None else min(chunks, available)
    return tokens[: count * n_ctx].reshape(count, n_ctx)


def checked_ids(config: ModelConfig, ids: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    """Token ids that a model knows.

    Raises:
      QjaxError: an id that is not in its vocabulary: a gather would give NaN for it.
    """
    unknown = ids[(ids < 0) | (ids >= config.vocab)]
    if unknown.size:
        raise QjaxError(
            f"token id {unknown[0]} is not in the model's vocabulary of {config.vocab}: "
            "the tokenizer is not this model's"
        )
    return ids.astype(np.int32)


def begun(chunks: Int32[np.ndarray, "chunks n_ctx"], bos_id: int | None) -> Int32[np.ndarray, "chunks n_ctx"]:
    """The chunks as a model is shown them: BOS stands first in each, if the model has one."""
    if bos_id is None:
        return chunks
    shown = chunks.copy()
    shown[:, 0] = bos_id
    return shown
