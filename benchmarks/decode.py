"""Decoding a TinyLlama-1.1B-shaped model: packed types against this machine's own float decode.

All models are in memory at once and take turns, token runs interleaved, so that a noisy machine is noisy to all;
the figure of each is the median run, and its ratio to the first the median of the ratios within a round. The limit is
what reading every packed byte once a token would allow, at the bandwidth measured in the same rounds.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from schemes import KINDS, scheme_params

from qjax.arrays import memory
from qjax.evaluate.shapes import shape_of
from qjax.evaluate.synthetic import synthetic_params
from qjax.generate import Greedy, decode, prefill, slots_for
from qjax.models import ModelConfig
from qjax.pipeline import one_stage

CASES = [
    ("f32", "float"),
    ("f16", "float"),
    ("q8_0", "float"),
    ("q8_0", "int8"),
    ("q4_0", "float"),
    ("q4_0", "int8"),
    ("q4_k_m", "float"),
    ("q4_k_m", "int8"),
]
# `--schemes`: the kinds of other ecosystems beside these; all are compared with the first.
SCHEME_CASES = [
    ("f16", "float"),
    ("q4_0", "int8"),
    ("q8_0", "int8"),
    *((name, "int8") for name in KINDS if name[0] == "w"),
    *((name, "float") for name in ("w4g128", "fp8", "fp8 dynamic", "nf4")),
]


def make_params(config: ModelConfig, name: str) -> Any:
    return scheme_params(config, name) if name in KINDS else synthetic_params(config, name)


def decode_rate(params: Any, config: ModelConfig, activations: Any, tokens: int) -> float:
    """Tokens per second of greedy decoding after a prompt of one token."""
    model = one_stage(params, config, activations)
    logits, cache = prefill(model, [[1]], model.init_cache(1, slots_for(1, tokens + 1)))
    logits.block_until_ready()
    start = time.perf_counter()
    for _ in decode(model, logits, cache, prompts=[[1]], steps=tokens + 1, sampler=Greedy()):
        pass
    return tokens / (time.perf_counter() - start)


def bandwidth(block: jax.Array) -> float:
    """Bytes per second of reading a float32 array much larger than the caches."""
    total = jax.jit(lambda a: jnp.dot(a, jnp.ones(a.shape[1], jnp.float32)))
    total(block).block_until_ready()
    start = time.perf_counter()
    total(block).block_until_ready()
    return block.nbytes / (time.perf_counter() - start)


def measure(shape: str, cases: list[tuple[str, str]], tokens: int, rounds: int) -> list[dict[str, Any]]:
    config = shape_of(shape).config
    params = {name: make_params(config, name) for name in dict.fromkeys(name for name, _ in cases)}
    for name, activations in cases:
        decode_rate(params[name], config, activations, 2)
    block = jnp.ones((1 << 15, 1 << 13), jnp.float32)
    rates: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    read = []
    for _ in range(rounds):
        read.append(bandwidth(block))
        for name, activations in cases:
            rates[name, activations].append(decode_rate(params[name], config, activations, tokens))
    gigabytes = float(np.median(read))
    rows = []
    for name, activations in cases:
        # A token reads one row of the embedding and all of the rest.
        rest = {key: value for key, value in params[name].items() if key != "token_embd"}
        touched = memory(rest).nbytes
        rate = float(np.median(rates[name, activations]))
        base = np.array(rates[cases[0]])
        rows.append(
            {
                "type": name,
                "activations": activations,
                "bytes": memory(params[name]).nbytes,
                "tokens_per_second": rate,
                "against_first": float(np.median(np.array(rates[name, activations]) / base)),
                "limit_tokens_per_second": gigabytes / touched,
                "of_limit": rate * touched / gigabytes,
                "samples": rates[name, activations],
            }
        )
    print(f"read bandwidth {gigabytes / 1e9:.1f} GB/s")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"| type | activations | GiB | tokens/s | against {rows[0]['type']} | of the bandwidth limit |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['type']} | {row['activations']} | {row['bytes'] / 2**30:.2f} | {row['tokens_per_second']:.1f} "
            f"| {row['against_first']:.2f}x | {100 * row['of_limit']:.0f} % |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", action="store_true", help="GPTQ's, AWQ's, W8A8, FP8 and NF4 weights")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    result = measure(args.shape, SCHEME_CASES if args.schemes else CASES, args.tokens, args.rounds)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
