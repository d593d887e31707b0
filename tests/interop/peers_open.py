"""Saved folders through the peers: open each, write its logits; run by a Python that has torch.

python peers_open.py IDS.npy OUT.npz FOLDER [FOLDER ...]: float32 logits [tokens, vocab] by the folder's name.
compressed-tensors goes through transformers with its own package, GPTQ through transformers with AutoRound's backend in
torch; AWQ, for which neither has one that needs no GPU, by AutoRound's own unpacking into transformers' float model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def opened(folder: Path) -> Any:
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if quantization["quant_method"] == "awq":
        return unpacked_awq(folder, quantization["group_size"])
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if quantization["quant_method"] == "gptq":
        from auto_round.inference.backend import BackendInfos

        # It unpacks zero points as well, but is not listed for them.
        BackendInfos["auto_round:torch_zp"].sym = [True, False]
        options["quantization_config"] = AutoRoundConfig(backend="torch")
    return AutoModelForCausalLM.from_pretrained(folder, **options)


if __name__ == "__main__":
    given, out, *folders = sys.argv[1:]
    ids = torch.from_numpy(np.load(given))[None]
    found = {}
    for folder in map(Path, folders):
        with torch.no_grad():
            found[folder.name] = opened(folder)(ids).logits[0].float().numpy()
    np.savez(out, **found)
