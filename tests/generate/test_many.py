"""Many prompts in one batch: each gets what it gets alone, whatever runs beside it."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.generate import generate_ids, make_sampler
from qjax.generate.many import generate_many_ids
from qjax.pipeline import Pipeline, Stage, one_stage

LENGTHS = [3, 40, 1, 7, 12, 2, 33]
PROMPTS = [np.random.default_rng(n).integers(3, 320, length).tolist() for n, length in enumerate(LENGTHS)]
N = 12


@pytest.fixture(scope="module")
def model(made: Any) -> Pipeline:
    return one_stage(made.params, made.config)


def alone(model: Pipeline, i: int, **options: Any) -> list[int]:
    steps = generate_ids(model, [PROMPTS[i]], max_tokens=N, cache_dtype=jnp.float32, **options)
    return [int(step[0]) for step in steps]


def many(models: Any, **options: Any) -> list[Any]:
    return list(generate_many_ids(models, PROMPTS, **{"max_tokens": N, "cache_dtype": jnp.float32} | options))


def test_each_prompt_gets_what_it_gets_alone(model: Pipeline) -> None:
    found = many(model, rows=3)
    assert [one.index for one in found] == list(range(len(PROMPTS)))
    assert [one.ids for one in found] == [alone(model, i) for i in range(len(PROMPTS))]
    assert not any(one.stopped for one in found)


def test_a_seed_of_its_own(model: Pipeline) -> None:
    sampler = make_sampler(temperature=1.5, repetition_penalty=1.2)
    found = many(model, rows=3, sampler=sampler, seed=9)
    assert [one.ids for one in found] == [alone(model, i, sampler=sampler, seed=9 + i) for i in range(len(PROMPTS))]


def test_texts_end_where_they_should(model: Pipeline) -> None:
    """At an end token, which is not part of them; the rest of the batch goes on."""
    whole = [alone(model, i) for i in range(len(PROMPTS))]
    ends = {whole[0][4], whole[3][0]}
    cut = [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in whole]
    found = many(model, rows=2, ends=ends)
    assert [one.ids for one in found] == cut
    assert [one.stopped for one in found] == [len(ids) < N for ids in cut]
    assert sum(one.stopped for one in found) >= 2


def test_more_rows_than_prompts(model: Pipeline) -> None:
    assert [one.ids for one in many(model, rows=9)] == [alone(model, i) for i in range(len(PROMPTS))]
    assert list(generate_many_ids(model, [], max_tokens=3)) == []


def test_stages_and_replicas_share_the_prompts(made: Any, model: Pipeline) -> None:
    devices = jax.devices()

    def on(device: Any) -> Any:
        return jax.device_put({k: v for k, v in made.params.items() if k != "rope_factors"}, device)

    first, last = on(devices[1]), on(devices[2])
    staged = Pipeline(
        (
            Stage({k: first[k] for k in ("rope", "token_embd")} | {"layers": first["layers"][:1]}, made.config,
                  devices[1], (True, False)),
            Stage({k: last[k] for k in last if k != "token_embd"} | {"layers": last["layers"][1:]}, made.config,
                  devices[2], (False, True)),
        )
    )  # fmt: skip
    expected = [alone(model, i) for i in range(len(PROMPTS))]
    assert [one.ids for one in many(staged, rows=4)] == expected
    assert [one.ids for one in many([model, staged], rows=2)] == expected


def test_a_context_that_is_full_ends_a_text(made: Any, model: Pipeline) -> None:
    long = np.random.default_rng(3).integers(3, 320, made.config.context - 5).tolist()
    [found] = generate_many_ids(model, [long], max_tokens=N, rows=2)
    assert len(found.ids) == 5
    assert not found.stopped


def test_prompts_are_read_as_rows_come_free(model: Pipeline) -> None:
    """There may be no end to them."""
    taken = []

    def endless() -> Any:
        for i in itertools.count():
            taken.append(i)
            yield PROMPTS[i % len(PROMPTS)]

    first = list(itertools.islice(generate_many_ids(model, endless(), max_tokens=2, rows=2), 3))
    assert [one.index for one in first] == [0, 1, 2]
    assert len(taken) < 9


def test_wrong_prompts_are_named(model: Pipeline) -> None:
    with pytest.raises(QjaxError, match="prompt 1: a prompt has no tokens"):
        list(generate_many_ids(model, [[1], []], max_tokens=2))
    with pytest.raises(QjaxError, match="prompt 0: a token id is not in"):
        list(generate_many_ids([model, model], [[10**6]], max_tokens=2))
    with pytest.raises(QjaxError, match="at least one row"):
        list(generate_many_ids(model, PROMPTS, max_tokens=2, rows=0))
