"""Prompts from a JSONL file: each text is the one that the prompt gets alone, and a killed run goes on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax.cli import main
from qjax.errors import FormatError
from qjax.pipeline import Device, Plan, StagePlan, write_plan
from qjax.runs.many import read_prompts

PROMPTS = ["def f(", "class A", "import os", "# a", "for i in"]
OPTIONS = ["-n", "6", "--temperature", "1", "--seed", "3", "--rows", "2"]


@pytest.fixture(scope="module")
def model() -> qjax.Model:
    return qjax.load("embedded")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_text_for_each_prompt_in_order(model: qjax.Model, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["generate", "embedded", "--prompts", str(prompts), "-o", str(out), *OPTIONS]) == 0
    found = lines(out)
    assert [line["index"] for line in found] == list(range(len(PROMPTS)))
    for i, (line, prompt) in enumerate(zip(found, PROMPTS, strict=True)):
        alone = model.infer(model.encode(prompt), 6, 1.0, seed=3 + i)
        assert line["ids"] == alone
        assert line["text"] == "".join(model.generate(prompt, max_tokens=6, temperature=1, seed=3 + i))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_replica_takes_a_share_and_changes_no_text(
    model: qjax.Model,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QJAX_CACHE", "off")
    out, plan = tmp_path / "out.jsonl", tmp_path / "plan.yaml"
    devices = (Device("cpu:1", 1 << 30, 1e10, 1e12, 1e10, 1e-6),)
    write_plan(plan, Plan((StagePlan(range(model.config.layers), ("cpu:1",)),), devices, 64, 2))
    opened, load = [], qjax.api.load
    monkeypatch.setattr("qjax.api.load", lambda *a, **o: (opened.append(o["plan"]), load(*a, **o))[1])
    command = ["generate", "embedded", "--replica", str(plan), *OPTIONS]
    assert main([*command, "--prompts", str(prompts), "-o", str(out)]) == 0
    assert opened == [None, str(plan)]
    for i, (line, prompt) in enumerate(zip(lines(out), PROMPTS, strict=True)):
        assert line["ids"] == model.infer(model.encode(prompt), 6, 1.0, seed=3 + i)
    capsys.readouterr()
    assert main([*command, "-p", "x"]) == 2
    assert "--replica and --rows are for many prompts" in capsys.readouterr().err


def test_a_killed_run_goes_on(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = ["generate", "embedded", "--prompts", str(prompts), "-o", str(out), *OPTIONS]
    real = qjax.Model.generate_many

    def dying(self: Any, *args: Any, **options: Any) -> Any:
        texts = real(self, *args, **options)
        yield next(texts)
        yield next(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(qjax.Model, "generate_many", dying)
    assert main(command) == 130
    assert not out.exists()
    assert len(lines(partial)) == 3
    # The next line was torn when the machine went down.
    with partial.open("a") as file:
        file.write('{"index": 2, "te')
    seen = []
    monkeypatch.setattr(
        qjax.Model, "generate_many", lambda self, rest, **o: (seen.append(len(rest)), real(self, rest, **o))[1]
    )
    assert main(command) == 0
    assert seen == [3]
    resumed = out.read_bytes()
    # Another wish begins anew, and gives the same as a run that was never killed.
    partial.write_text('{"qjax": "generate", "of": "something else"}\n{"index": 0}\n')
    assert main(command) == 0
    assert out.read_bytes() == resumed
    assert seen == [3, 5]


def test_from_an_event_loop(model: qjax.Model) -> None:
    async def both() -> list[list[int | None]]:
        async def one(prompt: str) -> list[int | None]:
            return [piece.id async for piece in model.stream_async(prompt, max_tokens=5, temperature=0)]

        return list(await asyncio.gather(one(PROMPTS[0]), one(PROMPTS[1])))

    wanted = [[piece.id for piece in model.stream(p, max_tokens=5, temperature=0)] for p in PROMPTS[:2]]
    assert asyncio.run(both()) == wanted


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "in.jsonl:2: not JSON"),
        ("[1]", 'in.jsonl:2: expected {"prompt"'),
        ('{"text": "a"}', 'in.jsonl:2: expected {"prompt"'),
        ('{"prompt": "a", "messages": []}', 'in.jsonl:2: expected {"prompt"'),
        ('{"prompt": 3}', "in.jsonl:2: expected a text as prompt, got int"),
        ('{"messages": ["a"]}', "in.jsonl:2: expected messages"),
        ("[" * 100_000, "in.jsonl:2: not JSON"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(FormatError) as found:
        read_prompts(str(path))
    assert words in str(found.value)


def test_arguments_that_do_not_go_together(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["-o", "x", "-p", "a"], ["-o", "x", "--stop", "a"]):
        assert main(["generate", "embedded", "--prompts", str(prompts), *more]) == 2
        assert "qjax: error: --" in capsys.readouterr().err
