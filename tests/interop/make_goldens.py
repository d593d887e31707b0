"""Tiny random models of every architecture that qjax knows, as GGUF files, with the logits transformers gives them.

    python tests/interop/make_goldens.py [--out FOLDER] [--seed N]

Needs `torch`, `transformers` and `gguf`; downloads nothing. Each variant is made from a config and a seed, its weights
rounded to float16 and run by transformers in float32 with eager attention; then it is written as llama.cpp's
convert_hf_to_gguf.py does: names from gguf's own tensor map, q and k rows permuted for arch `llama`, Llama 3's rope
scaling as a `rope_freqs` tensor. What lands in the folder is what `test_goldens.py` reads: NAME.gguf, NAME.npz
(tokens int32 [n], logits float32 [n, vocab]) and versions.json.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

TOKENS, VOCAB, HIDDEN, LAYERS, FFN = 44, 160, 64, 2, 64
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def rope(theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling}


# Original context 32 puts Llama 3's three cases (long, between, short wavelengths) all among 8 pairs.
LLAMA3 = rope(
    500.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# name: (transformers' class prefix, GGUF architecture, what differs from BASE)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", {"num_key_value_heads": 4} | rope()),
    "llama-3": ("Llama", "llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5} | LLAMA3),
    "llama-linear": ("Llama", "llama", {"num_key_value_heads": 2} | rope(rope_type="linear", factor=4.0)),
    "llama-tied": ("Llama", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True} | rope(100000.0)),
    "llama-head-dim": (
        "Llama",
        "llama",
        {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "mlp_bias": True} | rope(),
    ),
    "mistral": ("Mistral", "llama", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12} | rope()),
    "qwen2": ("Qwen2", "qwen2", {"num_key_value_heads": 2, "use_sliding_window": False} | rope(1000000.0)),
    "qwen3": ("Qwen3", "qwen3", {"num_key_value_heads": 2, "head_dim": 32, "use_sliding_window": False} | rope(1e6)),
}


def build(prefix: str, changes: dict[str, Any], generator: torch.Generator) -> Any:
    """A random model in float32 whose matrices are float16 numbers, scaled so that every part of it matters."""
    config = getattr(transformers, f"{prefix}Config")(**BASE | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.5 * noise)
            elif "embed_tokens" in name and not config.tie_word_embeddings:
                p.copy_(noise.half())
            else:
                p.copy_((1.5 * noise / math.sqrt(p.shape[1])).half())
    return model


def rope_factors(config: Any, head_dim: int) -> np.ndarray | None:
    """What convert_hf_to_gguf.py writes as `rope_freqs.weight` for Llama 3, None for other models."""
    p = config.rope_parameters
    if p["rope_type"] != "llama3":
        return None
    freqs = 1.0 / (p["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    old, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    factors = []
    for wavelength in (2 * math.pi / freqs).tolist():
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(p["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / p["factor"] + smooth))
    assert len({1.0, p["factor"]} & set(factors)) == 2, "not all cases of Llama 3's scaling occur"
    assert len(set(factors)) > 2, "no wavelength between the two limits occurs"
    return np.array(factors, np.float32)


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py: rotary pairs (i, i + half) of each head become (2i, 2i+1)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path: Path, arch: str, name: str, model: Any) -> None:
    """The model as llama.cpp's converter writes it: matrices in float16, all else in float32."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if head_dim * c.num_attention_heads != c.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    if c.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_parameters["factor"])
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    factors = rope_factors(c, head_dim)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        w = tensor.numpy()
        if arch == "llama" and ".q_proj." in hf_name:
            w = permute(w, c.num_attention_heads)
        if arch == "llama" and ".k_proj." in hf_name:
            w = permute(w, c.num_key_value_heads)
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, hf_name
        writer.add_tensor(gguf_name, w.astype(np.float16) if w.ndim == 2 else w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(folder: Path, seed: int) -> None:
    """All variants into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (prefix, arch, changes)) in enumerate(VARIANTS.items()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        model = build(prefix, changes, generator)
        tokens = torch.randint(VOCAB, (1, TOKENS), generator=generator)
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0]
        assert logits.dtype == torch.float32
        write(folder / f"{name}.gguf", arch, name, model)
        np.savez_compressed(folder / f"{name}.npz", tokens=tokens[0].numpy().astype(np.int32), logits=logits.numpy())
        print(f"{name}: logits up to {logits.abs().max():.2f}, {(folder / f'{name}.gguf').stat().st_size} bytes")
    versions = {"seed": seed, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"numpy": np.__version__}
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "goldens")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)
