"""Writes mixes.txt: the types that llama-quantize gives to models of real shapes, from files without weights.

    LLAMA_QUANTIZE=.../llama-quantize python tests/formats/gguf/make_mix_goldens.py

A file has its model's header as it would be, and holes for the tensors: it takes some kilobytes on the disk.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

GOLDENS = Path(__file__).with_name("mixes.txt")

# Metadata below "<arch>." and shapes in numpy order; vectors, norms too, are F32, the rest F16.
Model = tuple[str, dict[str, int | float | list[int]], dict[str, tuple[int, ...]]]


def decoder(
    arch: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    head_dim: int = 0,
    tied: bool = False,
    experts: int = 0,
    shared_ffn: int = 0,
    fused: bool = False,
) -> Model:
    """A Llama or what is built like one; with `experts`, `ffn` is the width of each."""
    head_dim = head_dim or hidden // heads
    metadata: dict[str, int | float | list[int]] = {
        "context_length": 4096,
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": vocab,
    }
    q, kv = heads * head_dim, kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_output": (hidden, q)}
    if fused:
        layer |= {"attn_qkv": (q + 2 * kv, hidden), "ffn_up": (2 * ffn, hidden), "ffn_down": (hidden, ffn)}
    else:
        layer |= {"attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
        up, down, end = (ffn, hidden), (hidden, ffn), "_exps" if experts else ""
        stack = (experts,) if experts else ()
        layer |= {f"ffn_gate{end}": stack + up, f"ffn_up{end}": stack + up, f"ffn_down{end}": stack + down}
    if experts:
        metadata |= {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": ffn}
        layer["ffn_gate_inp"] = (experts, hidden)
    if shared_ffn:
        metadata["expert_shared_feed_forward_length"] = shared_ffn
        layer |= {f"ffn_{kind}_shexp": (shared_ffn, hidden) for kind in ("gate", "up")}
        layer |= {"ffn_down_shexp": (hidden, shared_ffn), "ffn_gate_inp_shexp": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (vocab, hidden)
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return arch, metadata, shapes


def latent_attention() -> Model:
    """DeepSeek-V2-Lite: one dense layer before those with experts, values made from a compressed cache."""
    layers, hidden, rank, heads = 27, 2048, 512, 16
    arch, metadata, shapes = decoder(
        "deepseek2", layers, hidden, 1408, heads, heads, 102400, experts=64, shared_ffn=2816
    )
    metadata |= {"attention.kv_lora_rank": rank, "expert_shared_count": 2, "leading_dense_block_count": 1}
    metadata |= {"attention.key_length": 192, "attention.value_length": 128, "rope.dimension_count": 64}
    for name in [name for name in shapes if re.search(r"attn_[kv]\.|gate_inp_shexp|blk\.0\.ffn_.*exp", name)]:
        del shapes[name]
    for i in range(layers):
        shapes[f"blk.{i}.attn_q.weight"] = (heads * 192, hidden)
        shapes[f"blk.{i}.attn_kv_a_mqa.weight"] = (rank + 64, hidden)
        shapes[f"blk.{i}.attn_kv_b.weight"] = (heads * 256, rank)
    del shapes["blk.0.ffn_gate_inp.weight"]
    shapes |= {"blk.0.ffn_gate.weight": (10944, hidden), "blk.0.ffn_up.weight": (10944, hidden)}
    shapes["blk.0.ffn_down.weight"] = (hidden, 10944)
    return arch, metadata, shapes


MODELS: dict[str, Callable[[], Model]] = {
    "llama-7b": lambda: decoder("llama", 32, 4096, 11008, 32, 32, 32000),
    "llama-13b": lambda: decoder("llama", 40, 5120, 13824, 40, 40, 32000),
    "mistral-7b": lambda: decoder("llama", 32, 4096, 14336, 32, 8, 32000),
    "tinyllama-1.1b": lambda: decoder("llama", 22, 2048, 5632, 32, 4, 32000),
    "llama-65b": lambda: decoder("llama", 80, 8192, 22016, 64, 64, 32000),
    "llama-70b": lambda: decoder("llama", 80, 8192, 28672, 64, 8, 32000),
    "qwen2-72b": lambda: decoder("qwen2", 80, 8192, 29568, 64, 8, 152064),
    "mixtral-8x7b": lambda: decoder("llama", 32, 4096, 14336, 32, 8, 32000, experts=8),
    "8-experts-80-layers": lambda: decoder("llama", 80, 8192, 28672, 64, 8, 32000, experts=8),
    "qwen1.5-moe-a2.7b": lambda: decoder("qwen2moe", 24, 2048, 1408, 16, 16, 151936, experts=60, shared_ffn=5632),
    "qwen3-30b-a3b": lambda: decoder("qwen3moe", 48, 2048, 768, 32, 4, 151936, head_dim=128, experts=128),
    "deepseek-v2-lite": latent_attention,
    "phi-3-mini": lambda: decoder("phi3", 32, 3072, 8192, 32, 32, 32064, fused=True),
    "smollm-135m": lambda: decoder("llama", 30, 576, 1536, 9, 3, 49152, tied=True),
    "smollm-360m": lambda: decoder("llama", 32, 960, 2560, 15, 5, 49152, tied=True),
    "qwen2-0.5b": lambda: decoder("qwen2", 24, 896, 4864, 14, 2, 151936, tied=True),
    "llama-3.2-1b": lambda: decoder("llama", 16, 2048, 8192, 32, 8, 128256, tied=True),
    "rows-of-no-blocks": lambda: decoder("llama", 8, 80, 208, 5, 5, 512),
}

# Those of the tool, in its order.
MIXES = ["q1_0", "q2_0", "q4_0", "q4_1", "mxfp4_moe", "q5_0", "q5_1", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s"]
MIXES += ["iq1_m", "tq1_0", "tq2_0", "q2_k", "q2_k_s", "iq3_xxs", "iq3_s", "iq3_m", "iq3_xs", "q3_k_s", "q3_k_m"]
MIXES += ["q3_k_l", "iq4_nl", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "f16", "bf16", "f32"]
SOME = ["q2_k", "q4_0", "q4_k_m", "iq2_xs", "mxfp4_moe"]
# Beside every mix with and without importance, some with other options.
OPTIONS: list[tuple[str, str]] = [
    ("llama-7b", "--pure"),
    ("llama-7b", "--output-tensor-type q8_0 --token-embedding-type q5_K"),
    # A tensor with a type of its own is not counted.
    ("llama-7b", r"--tensor-type blk\.[0-3]\.ffn_down=q8_0 --tensor-type ATTN_V=q5_1 --tensor-type ffn_down=iq4_nl"),
    ("llama-7b", r"--tensor-type blk\.1?[0-2]\.(attn_v|ffn_down)=q8_0 --imatrix"),
    ("mixtral-8x7b", "--pure"),
    ("mixtral-8x7b", r"--tensor-type blk\.[0-3]\.ffn_down_exps=q8_0 --tensor-type blk\.2\.attn_v=f16"),
    ("qwen2-0.5b", "--pure --imatrix"),
    ("qwen2-0.5b", "--output-tensor-type q5_1"),
    ("qwen2-0.5b", "--output-tensor-type q5_K"),
    ("qwen2-0.5b", "--output-tensor-type q5_1 --token-embedding-type q4_1"),
    ("qwen2-0.5b", "--output-tensor-type q5_1 --tensor-type token=q4_K"),
]


def write_model(path: Path, name: str) -> Path:
    """A file of a model of MODELS, with holes for its tensors."""
    arch, metadata, shapes = MODELS[name]()
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)
    for tensor, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(tensor, shape, dtype, math.prod(shape) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = path.stat().st_size
    padded = sum(-(-math.prod(shape) * (4 if len(shape) == 1 else 2) // 32) * 32 for shape in shapes.values())
    os.truncate(path, size + padded + 32)
    return path


def write_imatrix(path: Path) -> Path:
    """An importance matrix with one entry: the choice of types goes only by whether there is one."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.ffn_down.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def types_by_llama_quantize(program: str, path: Path, mix: str, options: str, imatrix: Path) -> dict[str, str]:
    """Type of each tensor, as `llama-quantize --dry-run` says."""
    words = options.replace("--imatrix", f"--imatrix {imatrix}").split()
    command = [program, "--dry-run", *words, str(path), mix]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    line = re.compile(
        r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\S+), size = .*? MiB(?: -> .*? MiB \((\S+)\))?$", re.M
    )
    found = line.findall(done.stdout + done.stderr)
    return {name: (target or source).upper() for name, source, target in found}


def condense(types: dict[str, str]) -> str:
    """One line: "name=type" or "name=type*layers,type*layers", layers' tensors by one name, "*" for the rest."""
    by_suffix: dict[str, list[str]] = {}
    for name, kind in types.items():
        by_suffix.setdefault(re.sub(r"^blk\.\d+", "blk", name).removesuffix(".weight"), []).append(kind)
    texts: dict[str, list[str]] = {}
    for suffix, kinds in by_suffix.items():
        runs = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
        text = runs[0][0] if len(runs) == 1 else ",".join(f"{kind}*{n}" for kind, n in runs)
        texts.setdefault(text, []).append(suffix)
    rest = max(texts, key=lambda text: len(texts[text]))
    return " ".join([f"{','.join(names)}={text}" for text, names in texts.items() if text != rest] + [f"*={rest}"])


def expand(line: str, names: list[str]) -> dict[str, str]:
    """What `condense` made a line of, for these names in order."""
    left: dict[str, Iterator[str]] = {}
    rest = ""
    for item in line.split():
        suffixes, _, text = item.rpartition("=")
        for suffix in suffixes.split(","):
            if suffix == "*":
                rest = text
            runs = [run.partition("*") for run in text.split(",")]
            left[suffix] = itertools.chain.from_iterable(
                itertools.repeat(kind, int(n)) if n else itertools.repeat(kind) for kind, _, n in runs
            )
    types = {}
    for name in names:
        suffix = re.sub(r"^blk\.\d+", "blk", name).removesuffix(".weight")
        types[name] = next(left[suffix]) if suffix in left else rest
    return types


def quantized(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What goldens speak of: no vectors, in llama-quantize's order."""
    names = [name for name, shape in shapes.items() if len(shape) > 1]
    return sorted(names, key=lambda name: (int(name.split(".")[1]) if name.startswith("blk.") else -1, name))


def main() -> None:
    lines = ["# Types by llama-quantize --dry-run (ggml 0.25.3); make_mix_goldens.py writes them.", ""]
    with tempfile.TemporaryDirectory() as folder:
        imatrix = write_imatrix(Path(folder, "imatrix.gguf"))
        sections = [(name, "", MIXES) for name in MODELS] + [(name, options, SOME) for name, options in OPTIONS]
        for name, options, mixes in sections:
            path = write_model(Path(folder, "model.gguf"), name)
            names = quantized(MODELS[name]()[2])

            def line(mix: str, options: str, path: Path = path, names: list[str] = names) -> str:
                try:
                    types = types_by_llama_quantize(os.environ["LLAMA_QUANTIZE"], path, mix, options, imatrix)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    return f"{mix}: fails"
                text = condense({name: types[name] for name in names})
                assert expand(text, names) == {name: types[name] for name in names}
                return f"{mix}: {text}"

            plain = [line(mix, options) for mix in mixes]
            lines += [f"[{name} {options}]".replace(" ]", "]"), *plain, ""]
            if not options:
                weighted = [line(mix, "--imatrix") for mix in mixes]
                # Mixes that are not listed are as without importance.
                lines += [f"[{name} --imatrix]", *(text for text in weighted if text not in plain), ""]
            path.unlink()
            print(name, options, file=sys.stderr)
    GOLDENS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
