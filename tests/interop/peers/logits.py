"""Logits of folders as transformers computes them, in float32 on the CPU: the oracle for files that qjax wrote.

Run by a python that has transformers, and what the folders' formats need. compressed-tensors goes through transformers
with its own package. GPTQ and AWQ go through AutoRound: the kernels of auto-round-lib where it is installed, else, of
GPTQ, the ones in torch, and of AWQ its unpacking into transformers' float model.

The output is an .npz: float32 [samples, seq, vocab] by the name of each folder that there is a way for.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round.inference.backend import BackendInfos
from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig


def unpacked_awq(folder: Path, group_size: int) -> Any:
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from safetensors.torch import load_file

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        qweight, qzeros, scales = (tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
        tensors[f"{module}.weight"] = dequantize_gemm(qweight, qzeros, scales.float(), 4, group_size).T.contiguous()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return model


def opened(folder: Path) -> torch.nn.Module | None:
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    method, options = quantization.get("quant_method"), {}
    if quantization.get("desc_act"):
        # AutoRound raises NotImplementedError for groups in another order.
        return None
    if method in ("gptq", "awq"):
        kernels = importlib.util.find_spec("auto_round_kernel") is not None
        if method == "awq" and not kernels:
            return unpacked_awq(folder, quantization["group_size"])
        if not quantization["sym"] and not (kernels and quantization["bits"] in (2, 4, 8)):
            # The layer with zero points is there and right; it is only listed as one for symmetric weights.
            BackendInfos["auto_round:torch_zp"].sym = [True, False]
        # transformers' own way needs optimum and gptqmodel.
        options["quantization_config"] = AutoRoundConfig(backend="auto" if kernels else "torch")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
    # AutoRound leaves the model in float16, and transformers refuses to change that of a quantized one.
    return torch.nn.Module.float(model).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", type=Path, help=".npy of int32 [samples, seq] token ids")
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    ids = torch.from_numpy(np.load(args.ids)).long()
    found = {}
    for folder in args.folders:
        if (model := opened(folder)) is None:
            continue
        with torch.inference_mode():
            found[folder.name] = np.stack([model(row[None]).logits[0].float().numpy() for row in ids])
        linear = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
        print(json.dumps({"folder": folder.name, "layers": sorted(linear)}), flush=True)
    np.savez(args.output, **found)


if __name__ == "__main__":
    main()
