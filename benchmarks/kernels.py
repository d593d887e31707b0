"""One product, y[M, 2048] = x[M, 5632] @ w.T, for each type: packed kernels against XLA's own float32 dot.

Copies of each weight take turns, more of them than the caches hold, as the layers of a model do; types are
interleaved; figures are medians.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluate.synthetic import synthetic_blocks
from qjax.formats.gguf import from_blocks
from qjax.kernels import qmatmul, select

SHAPE = (2048, 5632)
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TYPES += ["IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_S", "IQ2_XS", "TQ2_0"]
# More than the last-level cache of most CPUs.
COLD_BYTES = 96 << 20


def measure(rows: int, rounds: int) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, SHAPE[1])), jnp.float32)
    cases = []
    for kind in TYPES:
        nbytes = synthetic_blocks("blk.0.ffn_down.weight", kind, SHAPE).nbytes
        copies = max(2, -(-COLD_BYTES // nbytes)) if rows == 1 else 2
        weights = [from_blocks(kind, synthetic_blocks(f"blk.{i}.ffn_down.weight", kind, SHAPE)) for i in range(copies)]
        for activations in ("float", "int8"):
            name = select(weights[0], rows, activations).name
            if activations == "int8" and "int8" not in name:
                continue
            run = jax.jit(partial(qmatmul, activations=activations))
            run(x, weights[0]).block_until_ready()
            cases.append((kind, name, run, weights, nbytes, []))
    for i in range(rounds):
        for _, _, run, weights, _, times in cases:
            start = time.perf_counter()
            run(x, weights[i % len(weights)]).block_until_ready()
            times.append(time.perf_counter() - start)
    base = np.array(cases[0][-1])
    print(f"\nM = {rows}\n\n| type | kernel | ms | against F32 | GB/s of packed bytes |\n|---|---|---|---|---|")
    for kind, name, _, _, nbytes, times in cases:
        median = float(np.median(times))
        ratio = float(np.median(base / np.array(times)))
        print(f"| {kind} | {name} | {median * 1e3:.2f} | {ratio:.2f}x | {nbytes / median / 1e9:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    args = parser.parse_args()
    for m in args.rows:
        measure(m, 31 if m <= 8 else 5)
