"""From a prompt's text to text, piece by piece: tokenizer, engine, streaming decoder and stop strings together."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from qjax.generate.engine import generate_ids
from qjax.generate.sampling import Sampler
from qjax.pipeline import Executor
from qjax.text import StopStrings, StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one step adds: `text`, whole characters only (it may be empty), and the token `id`, None at the end."""

    text: str
    id: int | None


def stream_text(
    model: Executor,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cache_dtype: Any = jnp.float16,
) -> Iterator[Piece]:
    """Continue a prompt of token ids until an end-of-generation token, a stop string, or `max_tokens`.

    `stop` is one stop string or several. It and the end token are not part of the text. Raises what
    `generate_ids` raises.
    """
    steps = generate_ids(
        model,
        [prompt],
        max_tokens=max_tokens,
        sampler=sampler,
        seed=seed,
        cache_dtype=cache_dtype,
    )
    # A str is a sequence of characters too, each of which would stop the text.
    stops = StopStrings([stop] if isinstance(stop, str) else stop)
    decoder = StreamDecoder(tokenizer, continuing=True)
    for row in steps:
        token = int(row[0])
        if token in tokenizer.eog_ids:
            break
        text, stopped = stops.push(decoder.push(token))
        yield Piece(text, token)
        if stopped:
            return
    text, stopped = stops.push(decoder.finish())
    yield Piece(text if stopped else text + stops.finish(), None)
