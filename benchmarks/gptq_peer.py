"""llm-compressor's GPTQ of one made-up layer, timed once for each line of standard input; run by its own python."""

import argparse
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=int)
    parser.add_argument("columns", type=int)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    w = torch.randn(1, args.out, args.columns)
    x = torch.randn(2 * args.columns, args.columns)
    hessian = 2 / len(x) * (x.T @ x)[None]
    del x
    options = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=128, actorder="static", observer="memoryless_minmax"
    )
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        # As its observer finds them.
        scale = w.unflatten(-1, (-1, 128)).abs().amax(-1) / 7.5
        quantize_weight(w.clone(), hessian.clone(), scale, torch.zeros_like(scale), None, options)
        print("seconds", time.perf_counter() - start, time.process_time() - used, flush=True)


if __name__ == "__main__":
    main()
