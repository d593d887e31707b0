"""qjax quantize against llama-quantize: the same float file, the same types, taking turns; whole processes, wall clock.

The file has made-up weights of a known shape (`qjax bench --save`), as llama.cpp reads them. Beside the times stand the
share of blocks that are the same bytes and how the squared errors of both compare on some tensors.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf.quants as oracle
import numpy as np
from gguf import GGMLQuantizationType
from vs_llamacpp import machine, model_file
from vs_llamacpp_report import table

from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.types import GGML_TYPES

COMPARED = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def compare(source: Path, ours: Path, theirs: Path) -> tuple[float, float]:
    """(share of equal blocks, our squared error over theirs) of the tensors in COMPARED."""
    floats, mine, other = open_gguf(source), open_gguf(ours), open_gguf(theirs)
    same, errors = [], np.zeros(2)
    for name in COMPARED:
        kind = other.tensors[name].type
        nbytes = GGML_TYPES[kind].block_bytes
        pair = [file.raw(name) for file in (mine, other)]
        same.append(np.equal(*(raw.reshape(-1, nbytes) for raw in pair)).all(axis=1))
        w = floats.raw(name).view(np.float16).astype(np.float32)
        errors += [float(((oracle.dequantize(raw, GGMLQuantizationType[kind]) - w) ** 2).sum()) for raw in pair]
    return float(np.concatenate(same).mean()), float(errors[0] / errors[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", metavar="PATH", required=True)
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_k_m", "q6_k"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of llama-quantize")
    parser.add_argument("--folder", type=Path, help="where the float file is kept; else it is made and removed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        source = model_file(args.folder or Path(temporary), args.shape, "f16")
        ours, theirs = (Path(temporary) / f"{side}.gguf" for side in ("ours", "theirs"))
        commands = {
            "qjax": lambda kind: (
                [sys.executable, "-m", "qjax.cli", "quantize", str(source), "-o", str(ours), "--type", kind]
            ),
            "llama-quantize": lambda kind: [args.llama_quantize, str(source), str(theirs), kind, str(args.threads)],
        }
        for kind in args.types:
            times: dict[str, list[float]] = {side: [] for side in commands}
            for number in range(args.rounds):
                for side in list(commands)[:: -1 if number % 2 else 1]:
                    times[side].append(seconds(commands[side](kind)))
            same, error = compare(source, ours, theirs)
            medians = {side: statistics.median(samples) for side, samples in times.items()}
            rows.append({"type": kind, "seconds": times, "same_blocks": same, "error_ratio": error, **medians})
            print(rows[-1], file=sys.stderr, flush=True)
    print(machine(Path("/proc/cpuinfo")), f"{args.shape}, f16\n", sep="; ")
    cells = [
        [
            r["type"],
            f"{r['qjax']:.1f}",
            f"{r['llama-quantize']:.1f}",
            f"{r['qjax'] / r['llama-quantize']:.2f}x",
            f"{100 * r['same_blocks']:.2f} %",
            f"{r['error_ratio']:.5f}",
        ]
        for r in rows
    ]
    print(table(["type", "qjax s", "llama-quantize s", "ratio", "same blocks", "error ratio"], cells))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
