"""A whole model quantized by `qjax quantize`: seconds of each block and of all, and the memory it took at most.

    python benchmarks/whole_model.py --shape tinyllama-1.1b --samples 128 --seq-len 512 --method gptq

Weights and tokens are made up, of the model's sizes. With --layers the model is only so deep: all blocks take the same
time, so that a few of them tell what the rest takes; the table says what was run, and extrapolates nothing. What is
finished stays in --folder: a run that was stopped goes on, and its clock starts anew.
"""

import argparse
import csv
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from vs_llamacpp import machine
from vs_llamacpp_report import table

from qjax.evaluate.shapes import Shape, shape_of
from qjax.evaluate.synthetic import save_synthetic

GIB = 1 << 30


def cut(shape: Shape, layers: int | None) -> Shape:
    return shape if layers is None else Shape(shape.name, dataclasses.replace(shape.config, layers=layers))


def quantized(model: Path, out: Path, tokens: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `qjax quantize --json` says, and the processor's seconds."""
    options = {"method": args.method, "bits": args.bits, "group-size": args.group_size, "data": tokens}
    options |= {"samples": args.samples, "seq-len": args.seq_len, "batch": args.batch}
    command = [sys.executable, "-m", "qjax.cli", "quantize", str(model), "-o", str(out), "--format", "qjax", "--json"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout) | {"processor": cpu}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = cut(shape_of(args.shape), args.layers)
    model, tokens, out = folder / "model.gguf", folder / "tokens.npy", folder / "out"
    if not model.exists():
        save_synthetic(model, shape, "f16")
    np.save(tokens, np.random.default_rng(0).integers(3, shape.config.vocab, (args.samples, args.seq_len), np.int32))
    found = quantized(model, out, tokens, args)
    with (out / "quantization.csv").open() as file:
        seconds: dict[str, float] = {}
        for row in csv.DictReader(file):
            if row["block"] not in ("", "-1"):
                seconds[row["block"]] = seconds.get(row["block"], 0.0) + float(row["seconds"])
    return {
        "shape": args.shape,
        "layers": shape.config.layers,
        "method": args.method,
        "scheme": f"w{args.bits}g{args.group_size}",
        "tokens": [args.samples, args.seq_len],
        "resumed": found["resumed"],
        "seconds": found["seconds"],
        "processor_seconds": found["processor"],
        "block_seconds": statistics.median(seconds.values()),
        "peak_memory": found["peak_memory"],
        "float_bytes": model.stat().st_size,
        "packed_bytes": found["bytes"],
    }


def report(found: dict[str, Any]) -> str:
    head = ["model", "method", "tokens", "seconds", "of the processor", "in a block's method", "peak memory", "packed"]
    row = [
        f"{found['shape']}, {found['layers']} layers",
        f"{found['method']} {found['scheme']}",
        "{} x {}".format(*found["tokens"]),
        f"{found['seconds']:.0f}",
        f"{found['processor_seconds']:.0f}",
        f"{found['block_seconds']:.1f}",
        f"{found['peak_memory'] / GIB:.2f} GiB",
        f"{found['packed_bytes'] / GIB:.2f} GiB",
    ]
    return table(head, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the model is made and kept, instead of a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(args, folder)
    print(f"{machine(Path('/proc/cpuinfo'))}\n\n{report(found)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
