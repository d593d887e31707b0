"""llm-compressor, run on given tokens: a float folder in, a compressed-tensors folder out.

Run by a python that has llm-compressor, never by qjax's. Options that are not named here are llm-compressor's defaults.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def scheme(bits: int, group: int, symmetric: bool, activations: str) -> dict:
    """What compressed-tensors calls a config group; group -1 is a scale for each channel."""
    where = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **where},
        "input_activations": tokens if activations == "int8" else None,
    }


def batches(samples: np.ndarray) -> DataLoader:
    ids = torch.from_numpy(samples.astype(np.int64))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(rows, batch_size=BATCH)  # pyright: ignore[reportArgumentType]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=Path, required=True, help=".npy of int32 [samples, length] token ids")
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--before", choices=["awq", "smoothquant"], help="what is done to the weights first")
    parser.add_argument("--strength", type=float, default=0.5, help="of smoothquant")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="-1: a scale for each channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--activations", choices=["float", "int8"], default="float")
    parser.add_argument("--actorder", choices=["default", "none", "static", "group"], default="default")
    args = parser.parse_args()
    torch.manual_seed(0)
    groups = {"group_0": scheme(args.bits, args.group, not args.asymmetric, args.activations)}
    first = {"awq": AWQModifier, "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=args.strength)}
    recipe = [] if args.before is None else [first[args.before]()]
    if args.method == "rtn":
        recipe.append(QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    else:
        order = {} if args.actorder == "default" else {"actorder": None if args.actorder == "none" else args.actorder}
        recipe.append(GPTQModifier(config_groups=groups, ignore=["lm_head"], **order))
    if not torch.accelerator.is_available():
        # AWQ pins what it keeps of the inputs whether or not there is an accelerator, without which torch refuses.
        torch.Tensor.pin_memory = lambda self, *_: self
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    samples = np.load(args.samples)
    start = time.perf_counter()
    oneshot(model=model, recipe=recipe, dataset=batches(samples), num_calibration_samples=len(samples))
    print(f"seconds {time.perf_counter() - start:.2f}")
    model.save_pretrained(args.output, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
