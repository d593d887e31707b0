"""A small model with 8 experts through `qjax quantize` and llama-quantize: the same types, nearly all blocks alike."""

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from qjax.errors import QjaxWarning
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.plan import Wish
from qjax.formats.gguf.types import GGML_TYPES
from qjax.runs.quantize import quantize_file

pytestmark = pytest.mark.interop

LAYERS, HIDDEN, FFN, EXPERTS, HEADS, VOCAB = 8, 256, 512, 8, 4, 64
UNSEEN = 5


def write_model(path: Path) -> Path:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{role}": (HIDDEN, HIDDEN) for role in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{role}_exps": (EXPERTS, FFN, HIDDEN) for role in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down_exps": (EXPERTS, HIDDEN, FFN), f"blk.{i}.ffn_gate_inp": (EXPERTS, HIDDEN)}
        shapes[f"blk.{i}.attn_norm"] = shapes[f"blk.{i}.ffn_norm"] = (HIDDEN,)
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) / 16).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_imatrix(path: Path, model: Path) -> Path:
    """Importances of each expert by itself; one of them has seen nothing."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, info in open_gguf(model).tensors.items():
        if len(info.shape) > 1 and name != "token_embd.weight":
            matrices = info.shape[0] if len(info.shape) == 3 else 1
            counts = np.arange(1, matrices + 1, dtype=np.float32)[:, None]
            counts[counts == UNSEEN + 1] = 0
            sums = rng.uniform(0, 4, (matrices, info.shape[-1])).astype(np.float32) * counts
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mix", ["q4_0", "q2_k", "q4_k_m", "mxfp4_moe"])
def test_equals_llama_quantize(mix: str, weighted: bool, llama_quantize: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model) if weighted else None
    options = [] if imatrix is None else ["--imatrix", imatrix]
    command = [llama_quantize, *options, model, tmp_path / "theirs.gguf", mix]
    subprocess.run(command, check=True, capture_output=True)
    if weighted:
        with pytest.warns(QjaxWarning, match=rf"{3 * LAYERS} matrices of experts"):
            quantize_file(model, tmp_path / "ours.gguf", Wish(mix), imatrix=imatrix)
    else:
        quantize_file(model, tmp_path / "ours.gguf", Wish(mix))
    ours, theirs = open_gguf(tmp_path / "ours.gguf"), open_gguf(tmp_path / "theirs.gguf")
    assert {n: i.type for n, i in ours.tensors.items()} == {n: i.type for n, i in theirs.tensors.items()}
    same: dict[str, list[np.ndarray]] = {}
    for name, info in theirs.tensors.items():
        pair = (file.raw(name).reshape(-1, GGML_TYPES[info.type].block_bytes) for file in (ours, theirs))
        same.setdefault(info.type, []).append(np.equal(*pair).all(axis=1))
    shares = {kind: float(np.concatenate(blocks).mean()) for kind, blocks in same.items()}
    assert min(shares.values()) >= 0.97, shares
