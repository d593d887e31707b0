"""`qjax plan`: a table or JSON, a file that says the same, and exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from qjax.pipeline import local
from qjax.pipeline.devices import Device
from qjax.pipeline.local import local_devices

ROOMY = "cuda:0=1GiB,cpu:0=2GiB@20GB/s"


def test_a_plan_is_written_and_read(run: Any, run_json: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    made = run_json("plan", model, "--devices", ROOMY, "--type", "q8_0", "--ctx", 64, "--batch", 2, "-o", path)
    assert made["feasible"]
    assert made["error"] is None
    assert made["nearest"] == []
    assert made["plan"]["context"] == 64
    assert [use["device"] for use in made["devices"]] == ["cuda:0", "cpu:0"]
    for use in made["devices"]:
        assert use["used"] == use["weights"] + use["kv_cache"] + use["work"] + use["host"]
        assert use["free"] == use["memory"] - use["used"]
    assert made["tokens_per_second"] > 0
    assert made["largest_batch"] > 2
    assert made["largest_context"] == 128
    again = run_json("plan", model, "--plan", path)
    assert again == made
    other = run_json(
        "plan", model, "--plan", path, "--batch", 3, "--kv-cache", "int8", "--devices", "cuda:0=3GiB,cpu=1GiB"
    )
    assert (other["plan"]["batch"], other["plan"]["cache"]) == (3, "int8")
    assert other["devices"][0]["memory"] == 3 << 30
    shown = run("plan", model, "--plan", path)
    assert shown.code == 0
    for words in ("cuda:0", "token_embd", "tokens/s predicted", "largest batch at this context", "limits: "):
        assert words in shown.out


def test_shapes_need_no_file(run_json: Any) -> None:
    found = run_json("plan", "7b", "--type", "q4_k_m", "--devices", "cuda:0=8GiB,cpu:0=16GiB", "--mode", "ratio 3:1")
    assert [stage["layers"] for stage in found["plan"]["stages"]] == [[0, 24], [24, 32]]
    assert found["plan"]["context"] == 4096


def test_no_room_is_an_error_with_a_way_out(run: Any, model: Path) -> None:
    small = ("plan", model, "--devices", "cpu:0=1MiB", "--ctx", 128, "--batch", 16)
    refused = run(*small)
    assert refused.code == 2
    assert "lacks" in refused.out
    assert refused.err.startswith("qjax: error: ")
    assert "cpu:0 lacks" in refused.err
    assert "what fits: " in refused.err
    as_json = run(*small, "--json")
    assert as_json.code == 2
    found = json.loads(as_json.out)
    assert not found["feasible"]
    assert found["lacks"]["cpu:0"] > 0
    assert found["nearest"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "abacus=1GiB"], "expected a device"),
        (["--devices", ROOMY, "--mode", "best"], "auto or ratio 3:1"),
        (["--devices", ROOMY, "--mode", "1:2:3"], "2 numbers"),
        (["--devices", ROOMY, "--ctx", "129"], "the model's 128"),
        (["--devices", ROOMY, "--type", "q9"], "q9"),
        (["--plan", "missing.yaml"], "missing.yaml"),
        (["--plan", "missing.yaml", "--mode", "auto"], "--mode and --objective"),
    ],
)
def test_options_that_make_no_plan(run: Any, model: Path, options: list[str], words: str) -> None:
    refused = run("plan", model, *options)
    assert (refused.code, refused.out) == (2, "")
    assert words in refused.err
    assert refused.err.count("\n") == 1


def test_a_prediction_stands_beside_the_speed(run: Any, run_json: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    run_json("plan", model, "--devices", "cpu:0=1GiB@1GB/s,cpu:1=1GiB@1GB/s", "--mode", "1:1", "-o", path)
    found = run_json("bench", model, "--plan", path, "--pp", 0, "--tg", 4, "--repeat", 1)
    assert found["predicted"] > 0
    assert run_json("bench", model, "--pp", 0, "--tg", 4, "--repeat", 1)["predicted"] is None
    refused = run("bench", "--shape", "tinyllama-1.1b", "--plan", path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--plan is for the speed of a file" in refused.err


def test_devices_here_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    times = []
    rates = {"bandwidth": 1e9, "flops": 2e9, "link": 3e9, "latency": 4e-6}
    monkeypatch.setattr(local, "measured", lambda device: times.append(device) or rates)
    monkeypatch.setattr(local, "available_memory", lambda: 8000)
    found = local_devices()
    assert found == tuple(Device(f"cpu:{i}", 1000, **rates) for i in range(8))
    assert local_devices() == found
    assert len(times) == 1
    for spoilt in ("{", "[]", '{"cpu": 3}', (tmp_path / "devices.json").read_text().replace("1000000000.0", "-1")):
        (tmp_path / "devices.json").write_text(spoilt)
        assert local_devices() == found
    assert len(times) == 5


def test_a_real_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    monkeypatch.setattr(local, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(local, "_SENT_BYTES", 1 << 16)
    monkeypatch.setattr(local, "_SIDE", 64)
    Device("cpu:0", 1, **local.measured(jax.devices("cpu")[0]))
