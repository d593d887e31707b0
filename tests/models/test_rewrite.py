"""Sources to GGUF files: a Hugging Face folder and the file it converts to are one and the same to all that follows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.cli import main
from qjax.errors import QjaxError
from qjax.formats.gguf import open_gguf

STORED = Path(__file__).parents[1] / "interop" / "goldens" / "hf"


def same_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def same_files(a: Path, b: Path) -> None:
    """The same tensors."""
    ours, theirs = open_gguf(a), open_gguf(b)
    assert {n: (t.type, t.shape) for n, t in ours.tensors.items()} == {
        n: (t.type, t.shape) for n, t in theirs.tensors.items()
    }
    for name in ours.tensors:
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))


@pytest.mark.parametrize("name", ["llama-3", "qwen2"])
@pytest.mark.parametrize("kind", ["q8_0", "f16", "q4_k_m"])
@pytest.mark.filterwarnings("ignore:.*rows of 48 are not whole:qjax.errors.QjaxWarning")
def test_a_folder_quantized_while_loading_is_its_quantized_file(name: str, kind: str, tmp_path: Path) -> None:
    qjax.convert(STORED / name, tmp_path / "packed.gguf", quantize=kind)
    loaded = qjax.load(STORED / name, quantize=kind)
    same_trees(loaded.params, qjax.load(tmp_path / "packed.gguf").params)
    # By way of a float file.
    qjax.convert(STORED / name, tmp_path / "float.gguf")
    qjax.convert(tmp_path / "float.gguf", tmp_path / "again.gguf", quantize=kind)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "packed.gguf").read_bytes()


def test_a_folder_loads_as_its_file(tmp_path: Path) -> None:
    qjax.convert(STORED / "llama-spm", tmp_path / "float.gguf")
    folder, file = qjax.load(STORED / "llama-spm"), qjax.load(tmp_path / "float.gguf")
    same_trees(folder.params, file.params)
    assert folder.config == file.config
    assert folder.source == STORED / "llama-spm"
    qjax.save(folder, tmp_path / "saved.gguf")
    same_files(tmp_path / "float.gguf", tmp_path / "saved.gguf")
    assert folder.encode("A patent license,") == file.encode("A patent license,")


def test_a_mix_is_what_quantize_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, ours, theirs = str(STORED / "llama-3"), tmp_path / "convert.gguf", tmp_path / "quantize.gguf"
    assert main(["convert", folder, "-o", str(ours), "--type", "q4_k_m", "--json"]) == 0
    said = {"path": str(ours), "files": [str(ours)], "bytes": ours.stat().st_size}
    assert json.loads(capsys.readouterr().out) == said
    assert main(["quantize", folder, "-o", str(theirs), "--type", "q4_k_m"]) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    assert open_gguf(ours).metadata["general.file_type"] == 15
    with pytest.raises(QjaxError, match="by `qjax quantize --allow-requantize`"):
        qjax.convert(ours, tmp_path / "x.gguf", quantize="q3_k_m")


def test_commands_take_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(STORED / "qwen2")
    assert main(["inspect", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["arch"], found["path"]) == ("Hugging Face safetensors", "qwen2", folder)
    assert {tensor["type"] for tensor in found["tensors"]} == {"F32", "BF16"}
    assert main(["tokenize", folder, "-p", "<|im_end|>", "--special", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ids": [322], "text": "<|im_end|>"}


@pytest.mark.filterwarnings("ignore:.*rows of 48 are not whole:qjax.errors.QjaxWarning")
def test_weights_that_are_not_finite_leave_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "llama-3"
    folder.mkdir()
    for path in (STORED / "llama-3").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoilt = bytearray((folder / "model.safetensors").read_bytes())
    spoilt[-2:] = np.array([np.inf], ml_dtypes.bfloat16).tobytes()
    spoilt[-2000:-1998] = spoilt[-2:]
    (folder / "model.safetensors").write_bytes(spoilt)
    with pytest.raises(QjaxError, match="expected finite weights"):
        qjax.convert(folder, tmp_path / "x.gguf", quantize="q8_0")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:output.weight. quantized without importance")
def test_a_trained_folder_by_importance(interop: Path, tmp_path: Path) -> None:
    """As from the float file that llama.cpp's converter made of it, and as quantized while loading."""
    options = ["--type", "q4_k_m", "--imatrix", str(interop / "imatrix.gguf")]
    for source, target in (("hf-float", "folder.gguf"), ("tiny-f16.gguf", "file.gguf")):
        assert main(["quantize", str(interop / source), "-o", str(tmp_path / target), *options]) == 0
    same_files(tmp_path / "folder.gguf", tmp_path / "file.gguf")
    loaded = qjax.load(interop / "hf-float", quantize="q4_k_m", imatrix=interop / "imatrix.gguf")
    same_trees(loaded.params, qjax.load(tmp_path / "folder.gguf").params)


HIDDEN, FFN, VOCAB, KV = 1024, 2816, 32000, 256
CHILD = """
import sys
import jax, numpy as np, qjax
from pathlib import Path
from qjax.quantizers.ggml import encode
# What programs take is no part of what weights take.
for kind in ("Q8_0", "Q4_K", "Q6_K"):
    for n in (1024, 2816):
        encode(kind, np.zeros((4, n), np.float32))
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
model = qjax.load(sys.argv[1], quantize=sys.argv[2])
jax.block_until_ready(model.params)
print(peak() - before, model.memory.nbytes)
"""


def big_folder(folder: Path) -> Path:
    """Two layers and a large vocabulary in bfloat16, 180 MB."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    shapes["model.norm.weight"] = (HIDDEN,)
    for i in range(2):
        rows = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)}
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": shape for name, shape in rows.items()}
        rows = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": shape for name, shape in rows.items()}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16).tobytes())
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes, **heads}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_memory_of_quantizing_while_loading(kind: str, tmp_path: Path) -> None:
    """The packed model and two float tensors, the largest ones there are."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(big_folder(tmp_path)), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, XLA_FLAGS=""))
    peak, packed = map(int, done.stdout.split())
    assert packed < 1.2 * 9 / 16 * (tmp_path / "model.safetensors").stat().st_size
    assert peak <= packed + 2 * 4 * VOCAB * HIDDEN, f"{peak / 2**20:.0f} MiB for {packed / 2**20:.0f} packed"
