"""Quantized folders as GGUF files: the same numbers where a type of GGUF holds them, else a way out."""

import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.gguf import open_gguf
from qjax.formats.source import Source, open_source

pytestmark = pytest.mark.interop


@jax.jit
def floats_of(array: Any) -> jax.Array:
    return array.dequantize() if hasattr(array, "dequantize") else array.astype(jnp.float32)


def floats(source: Source, name: str) -> np.ndarray:
    return np.asarray(floats_of(jax.tree.map(jnp.asarray, source.array(name))))


EXACT = {
    "hf-ct-gptq-w4g128": "Q4_0",
    "hf-gptq-w4g128": "Q4_0",
    "hf-awq-w4g32-sym": "Q4_0",
    "hf-gptq-w8g32": "Q8_0",
    "hf-ct-int8-w8a16": "Q8_0",
    "hf-ct-int8-w8a8": "Q8_0",
    "hf-gptq-w3g128": "Q4_0",
    "hf-gptq-w2g32-asym": "Q4_0",
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:.*a GGUF file cannot say that activations are rounded:qjax.errors.QjaxWarning")
def test_what_a_type_holds_is_kept(interop: Path, tmp_path: Path, name: str) -> None:
    source = open_source(interop / name)
    file = open_gguf(qjax.convert(interop / name, tmp_path / "kept.gguf"))
    assert {file.tensors[matrix].type for matrix in source.found} == {EXACT[name]}
    for matrix in list(source.found)[:8]:
        np.testing.assert_array_equal(floats(file, matrix), floats(source, matrix))


def test_rounded_activations_are_said_to_be_lost(interop: Path, tmp_path: Path) -> None:
    with pytest.warns(QjaxWarning, match=r"blk\.0\.\w+\.weight and 27 more: a GGUF file cannot say"):
        qjax.convert(interop / "hf-ct-int8-w8a8", tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["hf-ct-fp8-dynamic"])
@pytest.mark.filterwarnings("ignore:.*a GGUF file cannot say that activations are rounded:qjax.errors.QjaxWarning")
def test_what_no_type_holds_can_become_floats(interop: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"blk\.0\.\w+\.weight is .*no GGUF type holds .*--type f16"):
        qjax.convert(interop / name, tmp_path / "x.gguf")
    with pytest.raises(QjaxError, match="lose twice by `qjax quantize --allow-requantize`"):
        qjax.convert(interop / name, tmp_path / "x.gguf", quantize="q4_k_m")
    assert not list(tmp_path.iterdir())
    source = open_source(interop / name)
    file = open_gguf(qjax.convert(interop / name, tmp_path / "float.gguf", quantize="f16"))
    for matrix in list(source.found)[:3]:
        np.testing.assert_array_equal(floats(file, matrix), floats(source, matrix).astype(np.float16))


def test_llama_cpp_opens_what_was_kept(interop: Path, tmp_path: Path, llama_quantize: str) -> None:
    path = qjax.convert(interop / "hf-gptq-w4g128", tmp_path / "kept.gguf")
    command = [llama_quantize, "--allow-requantize", str(path), str(tmp_path / "again.gguf"), "Q4_0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    matrix = "blk.0.ffn_up.weight"
    np.testing.assert_array_equal(open_gguf(tmp_path / "again.gguf").raw(matrix), open_gguf(path).raw(matrix))
