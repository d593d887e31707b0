"""Tiny random models as transformers saves them, with what llama.cpp's converter makes of each.

    python tests/interop/make_hf_goldens.py LLAMA_CPP [--out FOLDER]

Needs torch, transformers, sentencepiece and the sources of llama.cpp; downloads nothing. Of each variant there is the
folder itself and, in converted.json, the SHA-256 of the whole GGUF file that convert_hf_to_gguf.py writes for it in the
checkpoint's own dtype; of RUN, NAME.npz has some token ids and transformers' logits of the last KEPT in float32. The
converter knows a BPE pre-tokenizer by the ids of known vocabularies, which these are not: its name is told to it.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TOKENS, KEPT = 40, 8
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name: (class prefix of transformers, dtype, what differs from BASE)
VARIANTS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama-3": (
        "Llama",
        torch.bfloat16,
        {"vocab_size": 320, "rope_parameters": LLAMA_3, "tie_word_embeddings": True, "attention_bias": True}
        | {"mlp_bias": True, "bos_token_id": 310, "eos_token_id": 311},
    ),
    "llama-spm": (
        "Llama",
        torch.float16,
        {"vocab_size": 370, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("Mistral", torch.float32, {"vocab_size": 360, "sliding_window": 16, "head_dim": 24}),
    "qwen2": (
        "Qwen2",
        torch.bfloat16,
        {
            "vocab_size": 336,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3": ("Qwen3", torch.float16, {"vocab_size": 336, "head_dim": 32}),
}
# Whose logits are stored; what else there is differs in what the converter's file shows.
RUN = ("llama-3", "qwen2")
PRE = {"llama-3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
# What the converter is run as: with the name of the pre-tokenizer that it cannot know.
CONVERTER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import conversion.base
name = sys.argv.pop(1)
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def save_model(folder: Path, prefix: str, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**BASE | changes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    # Shards where there is no other reason for the folder.
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if prefix == "Qwen2" else "1GB")
    if folder.name not in RUN:
        return
    tokens = torch.randint(changes["vocab_size"], (1, TOKENS))
    # Read again: rope's frequencies have been rounded with the weights.
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0]
    np.savez_compressed(f"{folder}.npz", tokens=tokens[0].numpy().astype(np.int32), logits=logits.numpy()[-KEPT:])


def byte_pairs(digits: str, ignore_merges: bool, size: int) -> Tokenizer:
    """BPE with the regex of Llama 3 or Qwen 2."""
    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    regex = rf"{letters}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return made


def save_llama_3(folder: Path) -> None:
    made = byte_pairs(r"\p{N}{1,3}", True, 310)
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    made.add_tokens([AddedToken("<extra>", normalized=False)])
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", 310)],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    write_json(folder / "tokenizer_config.json", config | {"chat_template": "{{ messages[0].content }}"})
    write_json(folder / "generation_config.json", {"eos_token_id": [311, 312], "temperature": 0.6, "top_p": 0.9})
    card = "---\nlicense: mit\nlanguage:\n- en\ntags:\n- test\nbase_model: meta-llama/Llama-3.2-1B\n---\n# A card\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_qwen(folder: Path) -> None:
    made = byte_pairs(r"\p{N}", False, 320)
    made.normalizer = normalizers.NFC()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<tool_call>", "<|box|>"])
    made.post_processor = processors.ByteLevel(False, trim_offsets=False, use_regex=False)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "bos_token": None}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if folder.name == "qwen2":
        templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
        config["chat_template"] = templates
    else:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


def save_sentencepiece(folder: Path) -> None:
    """Llama with tokens that tokenizer_config.json adds and replaces; Mistral with tokenizer.model and little else."""
    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=stored,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        character_coverage=0.98,
    )
    (folder / "tokenizer.model").write_bytes(stored.getvalue())
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "unk_token": "<unk>"}
    if folder.name == "llama-spm":
        added = {"1": ("<s>", True), "2": ("</s>", True), "359": ("<tool▁x>", False), "360": ("<|im_end|>", False)}
        config["added_tokens_decoder"] = {i: {"content": text, "special": s} for i, (text, s) in added.items()}
        config["add_prefix_space"] = False
        write_json(folder / "added_tokens.json", {"<|im_end|>": 360, "<other>": 361})
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def converted(folder: Path, llama_cpp: Path, dtype: str) -> str:
    """SHA-256 of the converter's file."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "converted.gguf"
        words = [str(llama_cpp), PRE.get(folder.name, ""), str(folder), "--outtype", dtype, "--outfile", str(target)]
        subprocess.run([sys.executable, "-c", CONVERTER, *words], check=True, capture_output=True)
        return hashlib.sha256(target.read_bytes()).hexdigest()


def make(out: Path, llama_cpp: Path) -> None:
    """All variants into `out`."""
    found = {}
    for name, (prefix, dtype, changes) in VARIANTS.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, prefix, dtype, changes)
        {"llama-3": save_llama_3, "qwen2": save_qwen, "qwen3": save_qwen}.get(name, save_sentencepiece)(folder)
        found[name] = converted(folder, llama_cpp, DTYPES[dtype])
        print(name, found[name])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(out / "converted.json", {"sha256": found, "versions": versions})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "goldens" / "hf")
    arguments = parser.parse_args()
    make(arguments.out, arguments.llama_cpp)
