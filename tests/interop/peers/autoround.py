"""AutoRound, run on given tokens: a float folder in, a folder in the GPTQ, AWQ or AutoRound format out.

Run by a python that has auto-round, never by qjax's. Options that are not named here are AutoRound's defaults.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=Path, required=True, help=".npy of int32 [samples, length] token ids")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="-1: a scale for each channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--format", default="auto_gptq", help="auto_gptq, auto_awq or auto_round")
    args = parser.parse_args()
    samples = torch.from_numpy(np.load(args.samples).astype(np.int64))
    tuned = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        bits=args.bits,
        group_size=args.group,
        sym=not args.asymmetric,
        iters=args.steps,
        seed=args.seed,
        dataset=list(samples.split(BATCH)),
        nsamples=samples.shape[0],
        seqlen=samples.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        # Else it computes in bfloat16, and rounds float16 weights to that before it begins.
        amp=False,
    )
    start = time.perf_counter()
    tuned.quantize_and_save(str(args.output), format=args.format)
    print(f"seconds {time.perf_counter() - start:.2f}")


if __name__ == "__main__":
    main()
