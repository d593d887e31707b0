"""Files that llama.cpp made: each loads packed, computes what its floats compute, and has llama.cpp's perplexity."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.arrays import QuantizedArray, memory
from qjax.evaluate import perplexity
from qjax.evaluate.compare import Candidate, compare
from qjax.formats.gguf import open_gguf
from qjax.generate import Greedy, generate_ids
from qjax.models import ModelConfig, forward, init_cache, load_gguf
from qjax.pipeline import one_stage
from qjax.text import Tokenizer

pytestmark = pytest.mark.interop

FLOATS = ["f16", "bf16"]
TERNARY = ["tq1_0", "tq2_0"]
QUANTIZED = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K_S", "q3_K_M", "q3_K_L", "q4_K_S", "q4_K_M"]
QUANTIZED += ["q5_K_S", "q5_K_M", "q6_K", "iq4_nl", "iq4_xs"]
IMATRIX = ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "q2_K", "q3_K_M", "q4_K_M"]
QUANTIZED += [f"imat-{kind}" for kind in IMATRIX]
KINDS = [*FLOATS, *QUANTIZED, *TERNARY]
# llama.cpp rounds activations to int8 for quantized types, and the ternary ones feel it most.
PERPLEXITY_TOLERANCE = dict.fromkeys(FLOATS, 5e-4) | dict.fromkeys(QUANTIZED, 1.5e-3) | dict.fromkeys(TERNARY, 5e-3)


class Opened(NamedTuple):
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer
    file_bytes: int


@functools.lru_cache(maxsize=1)
def opened(folder: Path, kind: str) -> Opened:
    file = open_gguf(folder / f"tiny-{kind}.gguf")
    params, config = load_gguf(file)
    size = sum(info.nbytes for info in file.tensors.values())
    return Opened(params, config, Tokenizer.from_gguf(file.metadata), size)


@functools.cache
def heldout(folder: Path) -> tuple[int, ...]:
    """The held-out text; all files have one tokenizer."""
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = opened(folder, "f16").tokenizer
    return tuple(tokenizer.encode(text, add_bos=tokenizer.add_bos))


@jax.jit
def dequantize(w: Any) -> Any:
    return w.dequantize()


def as_float32(params: dict[str, Any]) -> dict[str, Any]:
    def floats(w: Any) -> Any:
        return dequantize(w) if isinstance(w, QuantizedArray) else w.astype(jnp.float32)

    return jax.tree.map(floats, params, is_leaf=lambda w: isinstance(w, QuantizedArray))


def worst(got: Any, want: Any) -> float:
    return float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max())


def test_no_file_is_left_out(interop: Path) -> None:
    assert sorted(path.stem.removeprefix("tiny-") for path in interop.glob("tiny-*.gguf")) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
class TestFile:
    """Tests of one file stand together, so that it is opened once."""

    def test_packed_bytes_are_the_file_s(self, interop: Path, kind: str) -> None:
        m = opened(interop, kind)
        held = memory({key: value for key, value in m.params.items() if key != "rope"})
        assert held.nbytes == pytest.approx(m.file_bytes, rel=0.05)

    def test_packed_logits_equal_those_of_its_floats(self, interop: Path, kind: str) -> None:
        m = opened(interop, kind)
        ids = jnp.asarray(heldout(interop)[1000:1065], jnp.int32)[None]
        floats = as_float32(m.params)
        caches = [init_cache(m.config, 1, 80, jnp.float32) for _ in range(2)]
        # Many rows, few rows, one row: each may be another kernel's.
        for chunk in (ids[:, :60], ids[:, 60:64], ids[:, 64:]):
            packed, cache = forward(m.params, m.config, chunk, caches[0])
            plain, other = forward(floats, m.config, chunk, caches[1])
            assert cache is not None
            assert other is not None
            caches = [cache, other]
            assert worst(packed, plain) < 1e-5

    def test_perplexity_is_llama_cpp_s(self, interop: Path, kind: str, record_property: Any) -> None:
        m = opened(interop, kind)
        expected = json.loads((interop / "expected.json").read_text(encoding="utf-8"))["gguf"][f"tiny-{kind}.gguf"]
        bos = m.tokenizer.bos_id if m.tokenizer.add_bos else None
        result = perplexity(m.params, m.config, heldout(interop), n_ctx=512, bos_id=bos)
        off = result.perplexity / expected["perplexity"] - 1
        record_property("off_percent", 100 * off)
        print(f"{kind}: {result.perplexity:.4f}, llama.cpp {expected['perplexity']:.4f}, {100 * off:+.4f} %")
        assert abs(off) < PERPLEXITY_TOLERANCE[kind]
        assert result.stderr == pytest.approx(expected["stderr"], rel=0.01)


def test_divergences_are_llama_cpp_s(interop: Path) -> None:
    """With its activations, which are most of what q8_0 loses; over the whole text."""
    expected = json.loads((interop / "expected.json").read_text(encoding="utf-8"))["gguf"]
    names = [f"tiny-{kind}.gguf" for kind in ("q8_0", "q4_K_M", "q2_K")]
    base, *models = (
        Candidate(name, functools.partial(qjax.load, interop / name)) for name in ("tiny-f16.gguf", *names)
    )
    text = (interop / "heldout.txt").read_text(encoding="utf-8")
    found = {row.name: row.found for row in compare(models, text, base=base, activations="int8").rows}
    for name in names:
        print(f"{name}: {found[name].mean_kld:.6f}, llama.cpp {expected[name]['mean_kld']:.6f}")
        assert found[name].mean_kld == pytest.approx(expected[name]["mean_kld"], rel=0.05)
        assert 100 * found[name].same_top == pytest.approx(expected[name]["same_top_percent"], abs=0.3)


def test_logits_and_greedy_text_equal_transformers(interop: Path) -> None:
    m = opened(interop, "f16")
    with np.load(interop / "hf-float-logits.npz", allow_pickle=False) as stored:
        ids, logits, greedy = stored["ids"], stored["logits"], stored["greedy"]
    got, _ = forward(m.params, m.config, jnp.asarray(ids, jnp.int32)[None])
    assert worst(got[0], logits) < 1e-5
    steps = generate_ids(
        one_stage(m.params, m.config), [ids.tolist()], max_tokens=48, sampler=Greedy(), cache_dtype=jnp.float32
    )
    assert [*ids.tolist(), *(int(step[0]) for step in steps)] == greedy.tolist()
