"""GPTQ of one layer, qjax against llm-compressor, taking turns: seconds by the clock, and of the processor.

    QJAX_PEERS=/path/to/a/python/with/llmcompressor python benchmarks/gptq.py --shapes 2048x5632 4096x11008

Both quantize made-up weights to 4 bits in groups of 128 with act-order and static groups, the Hessian given; qjax once
more with its search for grids. What stands before and behind the algorithm (Hessians, packing) is not llm-compressor's
part here; qjax packs its codes within the time. Where the machine has other work, the processor's seconds tell more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from vs_llamacpp import machine
from vs_llamacpp_report import table

from qjax.arrays import Scheme
from qjax.quantizers.gptq import gptq

PEER = Path(__file__).with_name("gptq_peer.py")
SIDES = ("qjax", "qjax, grids searched", "llm-compressor")


def layer(out: int, columns: int) -> tuple[Any, Any]:
    """Weights, and second moments of twice as many random inputs as there are columns."""
    w, x = (jax.random.normal(jax.random.key(i), (n, columns)) for i, n in enumerate((out, 2 * columns)))
    return w, jax.jit(lambda x: 2 / x.shape[0] * x.T @ x)(x)


def ours(w: Any, hessian: Any, mse: bool) -> tuple[float, float]:
    start, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(gptq(w, hessian, Scheme(4, 128), mse=mse).array)
    return time.perf_counter() - start, time.process_time() - used


def measure(out: int, columns: int, rounds: int, peer: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor of each round, the sides' order turning; one round first goes by."""
    # -P: or packages that it imports would be looked for among the benchmarks.
    command = [peer, "-P", str(PEER), str(out), str(columns), "--threads", str(os.cpu_count())]
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        w, hessian = layer(out, columns)

        def theirs() -> tuple[float, float]:
            print(file=process.stdin, flush=True)
            # Its libraries may have something to say too.
            line = next(line for line in process.stdout if line.startswith("seconds "))
            return float(line.split()[1]), float(line.split()[2])

        runs = {SIDES[0]: lambda: ours(w, hessian, False), SIDES[1]: lambda: ours(w, hessian, True), SIDES[2]: theirs}
        for number in range(rounds + 1):
            for side in SIDES[:: -1 if number % 2 else 1]:
                seconds = runs[side]()
                print(f"{out}x{columns}", number, side, *(f"{s:.2f}" for s in seconds), file=sys.stderr, flush=True)
                if number:
                    found[side].append(seconds)
        process.stdin.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=os.environ.get("QJAX_PEERS"), help="a python that has llm-compressor")
    parser.add_argument("--shapes", nargs="+", default=["2048x5632", "4096x11008"], help="out x columns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.peer is None:
        raise SystemExit("give --peer, or set QJAX_PEERS: a python that has llm-compressor")
    rows, results = [], []
    for shape in args.shapes:
        out, columns = map(int, shape.split("x"))
        found = measure(out, columns, args.rounds, args.peer)
        results.append({"shape": shape, "seconds": found})
        medians = {
            side: [statistics.median(kind) for kind in zip(*times, strict=True)] for side, times in found.items()
        }
        for side in SIDES:
            ratios = [f"{medians[side][i] / medians[SIDES[2]][i]:.2f}x" for i in range(2)]
            rows.append([shape, side, f"{medians[side][0]:.2f}", ratios[0], f"{medians[side][1]:.2f}", ratios[1]])
    print(machine(Path("/proc/cpuinfo")))
    print(table(["out x in", "", "seconds", "ratio", "processor's", "ratio"], rows))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
