"""Real processes on this host, each with one stage: the tokens of one process, and a clear end when one is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qjax.errors import QjaxError
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.pipeline.distributed import environment, join
from qjax.runs.launch import free_port, launch

CONFIG = llama(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=264, context=160)
OPTIONS = ["-p", "ab", "--temperature", "0", "--activations", "float", "--json"]


def qjax(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    given = {**os.environ, "XLA_FLAGS": "", **(env or {})}
    command = [sys.executable, "-m", "qjax.cli", *arguments]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_synthetic(folder / "model.gguf", Shape("small", CONFIG), "q4_0")
    for count in (2, 4):
        bounds = {2: ["0", "1-3"], 4: ["0", "1", "2", "3"]}[count]
        rules = "".join(f"  - layers {layers}: cpu:0\n" for layers in bounds)
        (folder / f"{count}.yaml").write_text(f'devices: {{"cpu:0": 4GiB}}\ncontext: 160\nplace:\n{rules}')
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_give_the_tokens_of_one(model: Path, count: int) -> None:
    arguments = ["generate", str(model / "model.gguf"), *OPTIONS, "-n", "6"]
    alone = qjax(*arguments)
    several = qjax("launch", "-n", str(count), *arguments, "--plan", str(model / f"{count}.yaml"))
    found = [json.loads(process.communicate(timeout=240)[0])["ids"] for process in (alone, several)]
    assert several.returncode == 0
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_a_process_that_is_killed_ends_the_others(model: Path) -> None:
    """Without a launcher to see it: by what the connection says."""
    coordinator = f"127.0.0.1:{free_port()}"
    arguments = ["generate", str(model / "model.gguf"), *OPTIONS, "-n", "150", "--plan", str(model / "2.yaml")]
    first, second = (qjax(*arguments, env=environment(coordinator, 2, number)) for number in range(2))
    assert first.stderr is not None
    for line in first.stderr:
        if "Gloo" in line:
            break
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    error = first.communicate(timeout=60)[1]
    second.communicate()
    assert time.monotonic() - killed < 60
    assert first.returncode != 0
    assert "qjax: error: process 0 of 2 cannot reach another one, which ended or is cut off" in error


def test_the_launcher_says_who_failed(tmp_path: Path) -> None:
    with pytest.raises(QjaxError, match=r"process \d of 2 failed with exit code 2: the others were ended"):
        launch(["inspect", str(tmp_path / "none.gguf")], 2)


def test_more_processes_than_cores_cannot_be_pinned() -> None:
    with pytest.raises(QjaxError, match="cannot pin 100000 processes"):
        launch(["inspect"], 100_000, pin=True)


def test_numbers_that_are_none() -> None:
    assert join({}) is None
    with pytest.raises(QjaxError, match="set QJAX_PROCESSES and QJAX_PROCESS to numbers"):
        join({"QJAX_COORDINATOR": "127.0.0.1:1", "QJAX_PROCESSES": "2"})
    with pytest.raises(QjaxError, match="expected QJAX_PROCESS from 0 to 1, got 2"):
        join(environment("127.0.0.1:1", 2, 2))
