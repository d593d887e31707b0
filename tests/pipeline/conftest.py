"""Small made-up models and devices to plan with."""

import dataclasses
from typing import Any

import pytest

from qjax.evaluate.shapes import llama
from qjax.models import ModelConfig
from qjax.pipeline.sizes import Bytes, ModelSizes, Unit


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return llama(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=1024)


def uneven(
    config: ModelConfig, layer_bytes: list[int], *, ends: tuple[int, int] = (1000, 2000), tied: bool = False
) -> ModelSizes:
    """A model whose layers have these bytes, and its ends."""
    config = dataclasses.replace(config, layers=len(layer_bytes))
    units = [("token_embd", Bytes(vocab=ends[0]))]
    units += [(f"blk.{i}", Bytes(whole=n // 10, cut=n - n // 10)) for i, n in enumerate(layer_bytes)]
    units += [("output", Bytes(whole=64, vocab=ends[0] if tied else ends[1]))]
    made = tuple(Unit(name, held, held, 2 * sum(held) if name != "token_embd" else 0) for name, held in units)
    return ModelSizes("made up", config, made, tied)


@pytest.fixture(scope="session")
def sized(config: ModelConfig) -> Any:
    return lambda layer_bytes, **options: uneven(config, layer_bytes, **options)
