"""A budget over schemes: what fits, the rules that come of it, and the cost expected beside the one measured."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from looking import TOKENS, save_tiny

import qjax
from qjax.arrays import parse_scheme
from qjax.calibrate.data import Calibration
from qjax.errors import QjaxError
from qjax.formats.locate import EMBEDDED
from qjax.formats.source import open_source
from qjax.runs.budget import Budget
from qjax.runs.budget_schemes import candidates
from qjax.runs.quantize_blocks import Job, output_at, plan_model, quantize_model

KINDS = ("w3g64-asym", "w4g64-asym", "w6g64", "w8")
TEXT = Calibration(argparse.__file__)


def job(**budget: Any) -> Job:
    recipe = qjax.RTN(4, 64, rules=["token_embd=w8", "blk.0.attn_v=keep"])
    return Job("embedded", recipe, TEXT, budget=Budget(chunks=2, types=KINDS, **budget))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """`tiny(bpw=...)`: a job on a tiny model."""
    path = save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    recipe = qjax.RTN(4, 32, rules=["token_embd=w8", "output.weight=w8", "blk.0.attn_v=keep"])

    def job(**budget: Any) -> Job:
        types = ("w3g32-asym", "w4g32", "w6g32", "w8")
        return Job(path, recipe, Calibration(TOKENS.reshape(-1)), budget=Budget(chunks=1, types=types, **budget))

    return job


def test_a_scheme_for_each_matrix(tiny: Callable[..., Job], tmp_path: Path) -> None:
    made = quantize_model(tiny(bpw=6.0), output_at(tmp_path / "out", "qjax"))
    assert 5.8 < made["bits_per_weight"] <= 6.0
    schemes = {tensor["name"]: tensor["scheme"] for tensor in made["tensors"]}
    assert schemes["token_embd.weight"] == schemes["output.weight"] == "w8"
    assert "blk.0.attn_v.weight" not in schemes
    assert len(set(schemes.values())) > 2
    assert made["expected_kld"] > 0
    assert made["measured_kld"] > 0
    layer = qjax.load(tmp_path / "out").params["layers"][2]
    assert layer["attn_q"].bits_per_weight == pytest.approx(
        8 * parse_scheme(schemes["blk.2.attn_q.weight"]).nbytes((64, 64)) / 64**2
    )


@pytest.mark.slow
def test_it_fits_and_says_what_it_costs(tmp_path: Path) -> None:
    made = quantize_model(job(bpw=5.0), output_at(tmp_path / "out", "qjax"))
    assert 4.9 < made["bits_per_weight"] <= 5.0
    schemes = {tensor["name"]: tensor["scheme"] for tensor in made["tensors"]}
    assert schemes["token_embd.weight"] == "w8"
    assert "blk.0.attn_v.weight" not in schemes
    assert {"w3g64-asym", "w4g64-asym"} < set(schemes.values()) <= set(KINDS)
    assert made["expected_kld"] == pytest.approx(made["measured_kld"], rel=0.5)
    layer = qjax.load(tmp_path / "out").params["layers"][2]
    assert layer["attn_q"].bits_per_weight == pytest.approx(
        8 * parse_scheme(schemes["blk.2.attn_q.weight"]).nbytes((256, 256)) / 256**2
    )


def test_sizes(tiny: Callable[..., Job]) -> None:
    planned = plan_model(tiny(nbytes=120_000), "qjax")
    assert 116_000 < planned["bytes"] <= 120_000
    for bpw, words in ((5.0, "the smallest types take"), (0.05, "the budget leaves nothing")):
        with pytest.raises(QjaxError, match=words):
            plan_model(tiny(bpw=bpw), "qjax")


def test_what_may_be_chosen() -> None:
    """What a format does not hold, or a row no whole groups of, is left out."""
    source = open_source(EMBEDDED)
    recipe = job(bpw=4.0).recipe

    def holds(schemes: Any) -> None:
        if any(scheme.bits == 6 for scheme in schemes.values()):
            raise QjaxError("not of 6 bits")

    found = candidates(source, recipe, Budget(bpw=4.0, types=("w4g512", "w6g32", "w8")), holds)
    assert found["blk.1.ffn_down.weight"] == ["w8", "F16"]
    assert found["token_embd.weight"] == ["w8"]
    assert found["blk.0.attn_v.weight"] == ["F16"]
    with pytest.raises(QjaxError, match=r"blk\.0\.attn_q\.weight: none of w6g32 is possible"):
        candidates(source, recipe, Budget(bpw=4.0, types=("w6g32",)), holds)
    with pytest.raises(QjaxError, match="expected a scheme"):
        candidates(source, recipe, Budget(bpw=4.0, types=("q4_k",)), holds)
