"""The arithmetic and the tables of the benchmarks: what they measure is not run here."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qjax.arrays import memory
from qjax.calibrate.methods.awq import AWQ
from qjax.evaluate.shapes import llama

FOLDER = Path(__file__).parents[1] / "benchmarks"


# Scripts import their neighbours, as they may when they are run.
sys.path.append(str(FOLDER))


def script(name: str) -> ModuleType:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vs, shown = script("vs_llamacpp"), script("vs_llamacpp_report")


@pytest.fixture
def activations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "vs_llamacpp", vs)
    return script("activations")


# As llama-bench prints it, most fields left out.
LLAMA_BENCH = """[
  {"build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "backends": "CPU", "n_threads": 2,
   "flash_attn": 0, "n_prompt": 0, "n_gen": 8, "avg_ts": 1.361472, "stddev_ts": 0.0,
   "samples_ns": [5875994535], "samples_ts": [1.36147]},
  {"build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "backends": "CPU", "n_threads": 2,
   "flash_attn": 1, "n_prompt": 0, "n_gen": 8, "avg_ts": 0.917009, "stddev_ts": 0.0,
   "samples_ns": [8724015488], "samples_ts": [0.917009]}
]"""


def result() -> dict[str, Any]:
    """A run of two rounds as vs_llamacpp.py stores it."""
    peer = [{"0": 10.0, "1": 8.0}, {"0": 20.0, "1": 30.0}]
    tests = {"tg": {"qjax": [15.0, 20.0], "llama.cpp": peer}, "pp": {"qjax": [100.0, 60.0], "llama.cpp": peer}}
    return {
        "machine": "a machine",
        "versions": {"qjax": "1", "jax": "2", "llama.cpp": "3", "llama.cpp system": ""},
        "shape": "small",
        "threads": 2,
        "tokens": {"tg": 128, "pp": 512},
        "activations": "float",
        "touched": {"q4_0": 1e9, shown.INT4: 2e9},
        "bandwidth": 35e9,
        "samples": {"q4_0": tests, shown.INT4: {"tg": {"qjax": [30.0, 30.0]}, "pp": {"qjax": [50.0, 60.0]}}},
    }


def test_llama_bench_json() -> None:
    assert vs.parse_llama_bench(LLAMA_BENCH) == ("0c1e570 (build 1)", {"0": 1.36147, "1": 0.917009})


def test_llama_bench_json_of_two_tests_is_refused() -> None:
    mixed = json.loads(LLAMA_BENCH)
    mixed[0]["n_prompt"] = 64
    with pytest.raises(ValueError, match="expected one test"):
        vs.parse_llama_bench(json.dumps(mixed))


def test_paired_ratio_is_the_median_within_rounds() -> None:
    # A machine that was slow in one round was slow to both.
    assert shown.paired_ratio([2.0, 20.0, 30.0], [1.0, 10.0, 10.0]) == 2.0
    with pytest.raises(ValueError, match=r"shorter|longer"):
        shown.paired_ratio([1.0], [1.0, 2.0])


def test_best_flash_goes_by_the_median() -> None:
    assert shown.best_flash([{"0": 10.0, "1": 9.0}, {"0": 10.0, "1": 9.0}, {"0": 1.0, "1": 99.0}]) == "0"


@pytest.mark.parametrize("types", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_who_goes_first_alternates(types: list[str]) -> None:
    turns = list(vs.schedule(4, types))
    assert Counter((turn.type, turn.test) for turn in turns) == {(n, t): 4 for n in types for t in shown.TESTS}
    assert [turn.round for turn in turns] == sorted(turn.round for turn in turns)
    for name in types:
        for test in shown.TESTS:
            first = [turn.order[0] for turn in turns if (turn.type, turn.test) == (name, test)]
            assert first in (["qjax", "llama.cpp"] * 2, ["llama.cpp", "qjax"] * 2)
    assert all(sorted(turn.order) == sorted(vs.SIDES) for turn in turns)


def test_types_take_turns_in_memory_where_they_must() -> None:
    sizes = {"a": 3 << 30, "b": 4 << 30}
    assert vs.batches(sizes, 24 << 30) == [["a", "b"]]
    assert vs.batches(sizes, 20 << 30) == [["a"], ["b"]]


def test_rows() -> None:
    decode, prompt = shown.rows_of(result())
    assert (decode["type"], decode["test"], decode["flash_attention"]) == ("q4_0", "tg128", True)
    assert decode["llama.cpp"] == 19.0
    assert decode["ratio"] == pytest.approx((15 / 8 + 20 / 30) / 2)
    assert decode["ratio_of_medians"] == pytest.approx(17.5 / 19)
    assert (decode["target"], decode["met"]) == (1.30, False)
    assert decode["bytes_per_second"] == 17.5e9
    assert decode["of_bandwidth"] == pytest.approx(0.5)
    assert (prompt["test"], prompt["met"]) == ("pp512", True)
    assert "touched" not in prompt


def test_the_type_that_the_peer_has_not() -> None:
    decode, _ = shown.int4_rows(result())
    assert decode["against_qjax"] == pytest.approx((30 / 15 + 30 / 20) / 2)
    assert decode["against_llamacpp"] == pytest.approx((30 / 8 + 30 / 30) / 2)
    assert decode["touched"] == 2e9


def test_every_type_has_targets() -> None:
    assert shown.TARGETS["tg"].keys() == shown.TARGETS["pp"].keys()


def test_report_is_markdown() -> None:
    text = shown.report(result())
    assert "| q4_0 | tg128 | 17.50 | 19.00 (fa) | 1.27x | 0.92x | 1.30 missed | 1000 | 17.5 | 50 % |" in text
    assert "| int4 g128 | pp512 | 55.00 |" in text
    tables = [block.splitlines() for block in text.split("\n\n")[1:]]
    assert len(tables) == 2
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_plot_is_drawn(tmp_path: Path) -> None:
    shown.plot(result(), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_machine(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n")
    assert vs.machine(path) == "A CPU (AVX2, AVX-512, AVX-512 VNNI)"


def test_int4_weights() -> None:
    params = vs.int4_params(llama(layers=1, hidden=256, heads=2, kv_heads=1, ffn=384, vocab=300, context=64))
    down = params["layers"][0]["ffn_down"]
    assert down.shape == (256, 384)
    # 4 bits, and 16 of scale and 8 of zero point a group of 128.
    assert memory(down).bits_per_weight == pytest.approx(4 + 24 / 128)
    w = np.asarray(down.dequantize())
    assert np.isfinite(w).all()
    assert 0.5 < w.std() * 384**0.5 < 2


def test_divergence(activations: ModuleType) -> None:
    p = activations.log_softmax(np.log([[0.5, 0.5], [0.9, 0.1]]) + 7)
    q = activations.log_softmax(np.log([[0.5, 0.5], [0.5, 0.5]]))
    expected = [0.0, 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)]
    np.testing.assert_allclose(activations.divergence(p, q), expected, atol=1e-12)


def test_default_by_the_rule(activations: ModuleType) -> None:
    assert activations.default_of({"q4_0": 0.9, "q8_0": 1.1}) == "float"
    assert activations.default_of({"q4_0": 0.89, "q8_0": 1.1}) == "int8"


def test_report_of_activations(activations: ModuleType) -> None:
    quality = dict.fromkeys(("kld_float", "kld_int8", "kld_int8_to_float", "same_top_float", "same_top_int8"), 0.5)
    quality |= dict.fromkeys(("ppl_reference", "ppl_float", "ppl_int8"), 20.0)
    speed = {"type": "q4_0", "float": 10.0, "int8": 20.0, "ratio": 0.5}
    text = activations.report(
        {"machine": "m", "commit": "", "quality": [{"model": "x", **quality}], "speed": [speed], "default": "int8"}
    )
    assert "| q4_0 | 10.00 | 20.00 | 0.50x |" in text
    assert "| 50.00 % | 50.00 % |" in text
    assert text.endswith("of int8's speed): int8")


def test_methods_by_name() -> None:
    methods = script("methods")
    assert repr(methods.method_of("awq:clip=False:n_grid=10")) == repr(AWQ(clip=False, n_grid=10))
    assert methods.method_of("smoothquant:alpha=None").alpha is None
    with pytest.raises(SystemExit, match="no method"):
        methods.method_of("pairs")
