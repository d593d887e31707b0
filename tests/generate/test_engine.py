"""The loops against the plain forward: same tokens, whatever the chunks, the batch and the cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.generate import engine, generate_ids, make_sampler, prefill, slots_for
from qjax.models import forward, slots
from qjax.models.slots import LARGE_CHUNK, SLOT_UNIT, SMALL_CHUNK, chunk_sizes
from qjax.pipeline import Pipeline, one_stage, stage


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 320, length).tolist()


def texts(made: Any, prompts: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[int]]:
    """The tokens of each row; the cache holds what it is given."""
    options = {"cache_dtype": jnp.float32} | options
    steps = list(generate_ids(one_stage(made.params, made.config), prompts, max_tokens=n, **options))
    assert all(step.dtype == np.int32 for step in steps)
    return np.stack(steps, axis=1).tolist()


@given(st.integers(0, 10_000))
def test_a_prompt_is_cut_into_chunks_of_two_sizes(length: int) -> None:
    sizes = chunk_sizes(length)
    assert set(sizes) <= {LARGE_CHUNK, SMALL_CHUNK}
    assert sum(sizes) >= length
    # No chunk is all padding, and the large ones come first.
    assert sum(sizes[:-1]) < max(length, 1)
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_slots_leave_room_for_padding_and_answer(prompt: int, new: int) -> None:
    slots = slots_for(prompt, new)
    assert slots >= prompt + new
    assert slots >= sum(chunk_sizes(prompt))
    assert slots % SLOT_UNIT == 0
    assert slots < max(prompt + new, sum(chunk_sizes(prompt))) + SLOT_UNIT


def test_any_prompt_runs_in_few_programs(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    real = Pipeline.forward

    def spy(self: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        seen.add(tokens.shape)
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(Pipeline, "forward", spy)
    for length in (1, 31, 32, 33, 150, 193, 512, 513, 600):
        texts(made, [prompt_of(length)], 2)
    assert seen == {(1, SMALL_CHUNK), (1, LARGE_CHUNK)}


@pytest.mark.parametrize("length", [1, 32, 33, 230, 520])
def test_prefill_gives_the_logits_of_the_last_token(made: Any, length: int) -> None:
    prompt = prompt_of(length)
    model = one_stage(made.params, made.config)
    logits, cache = prefill(model, [prompt], model.init_cache(1, slots_for(length, 0), jnp.float32))
    whole, _ = forward(made.params, made.config, jnp.asarray([prompt], jnp.int32))
    np.testing.assert_allclose(np.asarray(logits), np.asarray(whole[:, -1]), atol=2e-5)
    assert model.lengths(cache).tolist() == [length]


@pytest.mark.parametrize("length", [1, 40])
def test_greedy_is_the_argmax_of_the_whole_forward(made: Any, length: int) -> None:
    prompt = prompt_of(length)
    row = texts(made, [prompt], 12)[0]
    logits, _ = forward(made.params, made.config, jnp.asarray([prompt + row[:-1]], jnp.int32))
    assert row == np.asarray(logits[0, length - 1 :]).argmax(axis=-1).tolist()


def test_unequal_prompts_give_what_each_gives_alone(made: Any) -> None:
    prompts = [prompt_of(length, seed=length) for length in (1, 70, 9)]
    together = texts(made, prompts, 8)
    assert together == [texts(made, [prompt], 8)[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) == 3


def test_a_narrow_cache_changes_little(made: Any) -> None:
    prompt = prompt_of(20)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int8):
        assert texts(made, [prompt], 1, cache_dtype=dtype) == texts(made, [prompt], 1)


def test_a_seed_decides(made: Any) -> None:
    sampler, prompt = make_sampler(temperature=1.5), prompt_of(5)
    runs = [texts(made, [prompt], 12, sampler=sampler, seed=seed) for seed in (7, 7, 8, 2**32 - 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0] != runs[3]
    for seed in (-1, 2**32):
        with pytest.raises(QjaxError, match=rf"expected a seed from 0 to 4294967295, got {seed}"):
            texts(made, [prompt], 1, seed=seed)


def test_a_repetition_penalty_sees_prompt_and_answer(made: Any) -> None:
    prompt = prompt_of(10)
    sampler = make_sampler(temperature=0, repetition_penalty=1e6)
    row = texts(made, [prompt], 40, sampler=sampler)[0]
    assert len({*row, *prompt}) == 40 + len(set(prompt))


def test_the_context_may_be_filled_and_not_more(made: Any) -> None:
    prompt = prompt_of(made.config.context - 3)
    assert len(texts(made, [prompt], 3)[0]) == 3
    with pytest.raises(QjaxError, match=r"637 .* 4 new ones exceed the context of 640: .* at most 3 .*-n 3"):
        texts(made, [prompt, [1]], 4)
    with pytest.raises(QjaxError, match="exceed the context of 640: give a shorter prompt"):
        texts(made, [prompt_of(made.config.context)], 1)


def slots_of_steps(made: Any, monkeypatch: pytest.MonkeyPatch, prompt: Sequence[int], n: int) -> list[int]:
    """The cache's slots in each step of decoding."""
    seen = []
    with_room = engine.with_room

    def spy(model: Any, *arguments: Any) -> Any:
        cache = with_room(model, *arguments)
        seen.append(model.slots(cache))
        return cache

    monkeypatch.setattr(engine, "with_room", spy)
    texts(made, [prompt], n)
    return seen


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_is_one_program_or_many(made: Any, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    expected = texts(made, [prompt_of(5), prompt_of(9)], 12)
    monkeypatch.setattr(stage, "compiles_fast", lambda platform: whole)
    assert texts(made, [prompt_of(5), prompt_of(9)], 12) == expected


def test_the_cache_grows_when_it_is_full(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By doubling, to what the context needs (768 slots for 640), whatever may come."""
    prompt, n = prompt_of(3), 600
    # The first token comes from the prompt; the step that would fill slot 512 has more.
    assert slots_of_steps(made, monkeypatch, prompt, n) == [512] * (512 - 3) + [768] * (n - 1 - 512 + 3)
    assert slots_of_steps(made, monkeypatch, prompt, 2) == [256]


def test_a_large_context_costs_nothing_until_it_is_used(made: Any) -> None:
    """A cache for all of these tokens would take gigabytes."""
    config = dataclasses.replace(made.config, context=(1 << 24) - 1)
    steps = generate_ids(one_stage(made.params, config), [[1]], max_tokens=(1 << 24) - 2)
    assert next(steps).tolist() == next(generate_ids(one_stage(made.params, made.config), [[1]], max_tokens=1)).tolist()


def test_a_cache_that_grew_gives_the_same_tokens(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt_of(230), prompt_of(9, seed=1)]
    whole = texts(made, prompts, 60)
    monkeypatch.setattr(engine, "NEW_SLOTS", 1)
    monkeypatch.setattr(slots, "SLOT_UNIT", 16)
    monkeypatch.setattr(slots, "LARGE_CHUNK", 256)
    assert slots_for(230, 1) == 256
    assert texts(made, prompts, 60) == whole
    assert texts(made, prompts[:1], 60) == whole[:1]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "a prompt has no tokens"),
        ([[]], "a prompt has no tokens"),
        ([[1], []], "a prompt has no tokens"),
        ([[320]], "a token id is not in the model's vocabulary of 320"),
        ([[1, -1]], "a token id is not in the model's vocabulary of 320"),
    ],
)
def test_wrong_prompts_are_errors(made: Any, prompts: list[list[int]], words: str) -> None:
    with pytest.raises(QjaxError, match=words):
        texts(made, prompts, 2)
