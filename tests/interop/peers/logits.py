"""Logits of a folder as transformers computes them, float32 on the CPU: the oracle for files that qjax wrote.

Run by a python that has transformers, and what the folder's format needs: compressed-tensors, or auto-round for GPTQ
and AWQ. The output is an .npz with "logits", float32 [samples, seq, vocab].
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig, CompressedTensorsConfig


def opened(folder: Path, dequantize: bool, backend: str) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    options = {}
    if config.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=dequantize)
    elif config.get("quant_method") in ("gptq", "awq"):
        # transformers' own way needs optimum and gptqmodel; AutoRound's reads both formats, and runs on a CPU.
        options["quantization_config"] = AutoRoundConfig(backend=backend)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
    # AutoRound leaves the model in float16, and transformers refuses to change that of a quantized one.
    return torch.nn.Module.float(model).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", type=Path, help=".npy of int32 [samples, seq] token ids")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dequantize", action="store_true", help="compressed-tensors: floats once it is opened")
    parser.add_argument("--backend", default="auto", help="AutoRound's, for GPTQ and AWQ")
    args = parser.parse_args()
    model = opened(args.folder, args.dequantize, args.backend)
    with torch.inference_mode():
        found = [model(ids[None]).logits[0].float().numpy() for ids in torch.from_numpy(np.load(args.ids)).long()]
    kinds = {type(module).__name__: type(module).__module__ for module in model.modules()}
    print(json.dumps({name: where for name, where in kinds.items() if "Linear" in name or "Quant" in name}))
    np.savez(args.output, logits=np.stack(found))


if __name__ == "__main__":
    main()
