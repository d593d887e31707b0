"""A model that is made up in a moment, and a sampler that says what it is told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from qjax.evaluate.shapes import Shape, llama, metadata
from qjax.evaluate.synthetic import synthetic_params
from qjax.generate import Greedy
from qjax.models import ModelConfig
from qjax.text import Tokenizer

# Its vocabulary: 3 control tokens, 256 bytes, "▁", the letters, pairs of letters. Room for a large chunk.
SHAPE = Shape("tiny", llama(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=640))


class Made(NamedTuple):
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def made() -> Made:
    """Params, config and tokenizer of a made-up model; logits of one token are about as far apart as a real one's."""
    return Made(synthetic_params(SHAPE.config, "f16"), SHAPE.config, Tokenizer.from_gguf(metadata(SHAPE, "f16")))


@dataclass(frozen=True)
class Script:
    """A strategy that lets one token through: the first of `ids` that was not seen yet."""

    ids: tuple[int, ...]

    def __call__(self, logits: Any, seen: Any) -> Any:
        ids = jnp.asarray(self.ids, jnp.int32)
        now = ids[jnp.argmin(seen[:, ids], axis=-1)]
        return jnp.where(jnp.arange(logits.shape[-1])[None] == now[:, None], 0.0, -jnp.inf).astype(logits.dtype)


@pytest.fixture(scope="session")
def saying() -> Callable[[list[int]], Greedy]:
    """`saying(ids)`: a sampler that gives these ids, all different and none of them in the prompt, one by one."""
    return lambda ids: Greedy((Script(tuple(ids)),))
