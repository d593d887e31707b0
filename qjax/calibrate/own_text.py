"""Text that a model writes by itself, for calibration where there is no text to calibrate on.

Drawn from the model's own predictions without any cut (temperature 1), it is what the model holds language to be; Liu
et al. 2023 ("LLM-QAT", section 3.1) find it as good as real text.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from qjax.models import ModelConfig, forward, init_cache


def own_text(
    params: dict[str, Any],
    config: ModelConfig,
    *,
    chunks: int,
    n_ctx: int,
    bos_id: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Int32[np.ndarray, "chunks n_ctx"]:
    """Chunks of token ids, written side by side.

    Args:
      bos_id: what each begins with; None for a token drawn from the whole vocabulary.
      progress: called as (tokens of each chunk, n_ctx).
    """
    key, first = jax.random.split(jax.random.key(seed))
    if bos_id is None:
        token = jax.random.randint(first, (chunks, 1), 0, config.vocab, jnp.int32)
    else:
        token = jnp.full((chunks, 1), bos_id, jnp.int32)
    cache = init_cache(config, chunks, n_ctx)
    written = [np.asarray(token)]
    while len(written) < n_ctx:
        logits, cache = forward(params, config, token, cache)
        key, draw = jax.random.split(key)
        token = jax.random.categorical(draw, logits[:, -1])[:, None].astype(jnp.int32)
        written.append(np.asarray(token))
        progress(len(written), n_ctx)
    return np.concatenate(written, axis=1)
