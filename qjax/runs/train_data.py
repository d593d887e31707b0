"""Text -> the windows of tokens that each step learns from, as a pure function of (seed, step)."""

import numpy as np
from jaxtyping import Int, UInt16
from tokenizers import Tokenizer

from qjax.runs.train_tokenizer import BOS_ID, EOS_ID


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> UInt16[np.ndarray, " n"]:
    """All texts as one row of ids, each between BOS and EOS."""
    pieces = [[BOS_ID, *encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(piece, np.uint16) for piece in pieces])


def training_batch(
    stream: UInt16[np.ndarray, " n"], step: int, batch_size: int, context: int, seed: int
) -> Int[np.ndarray, "batch window"]:
    """The windows (context + 1 tokens, the first replaced by BOS) that a step learns from.

    Each pass cuts the stream at another offset and takes the windows in another order, both drawn from
    (seed, pass). A window opens with BOS because that is how perplexity chunks and prompts open.
    """
    n_windows = (len(stream) - context) // context
    rows = []
    for sample in range(step * batch_size, (step + 1) * batch_size):
        rng = np.random.default_rng((seed, sample // n_windows))
        offset = int(rng.integers(context))
        start = offset + context * int(rng.permutation(n_windows)[sample % n_windows])
        rows.append(stream[start : start + context + 1])
    batch = np.stack(rows).astype(np.int32)
    batch[:, 0] = BOS_ID
    return batch
