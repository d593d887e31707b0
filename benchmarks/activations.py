"""What int8 activations cost in quality and gain in speed, which decides the default that ships.

Quality: mean KL divergence to the float model's next-token probabilities (same weights as f16, float activations),
over all positions of chunks of 512 tokens; perplexity by llama-perplexity's method, on the second half of each chunk;
how often the most likely token is the same. Files: those that llama-quantize made of one small model (the folder
QJAX_INTEROP), and the model inside the package. Speed: decoding of a TinyLlama-1.1B shape, both in turns.
"""

import argparse
import glob
import heapq
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from vs_llamacpp import Worker, commit, machine, model_file
from vs_llamacpp_report import paired_ratio, table

BOTH = ("float", "int8")
EMBEDDED_TYPES = ("q8_0", "q5_1", "q4_0")
SPEED_TYPES = ("q4_0", "q8_0", "q4_k_m", "q6_k")
CONTEXT = 512
# Float ships where it decodes at no less than this share of int8's speed: it is the more faithful one.
FLOAT_IF_ABOVE = 0.9


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [..., vocab] in float64."""
    wide = np.asarray(logits, np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each row of log-probabilities, in nats."""
    return (np.exp(reference) * (reference - other)).sum(-1)


def logits_of(model: Any, chunks: np.ndarray, activations: str) -> np.ndarray:
    """Logits [chunks, CONTEXT, vocab] after each token, float32; each chunk starts with BOS where the model has one."""
    import jax.numpy as jnp

    from qjax.models import forward

    tokens = chunks.copy()
    if model.tokenizer.add_bos:
        tokens[:, 0] = model.tokenizer.bos_id
    return np.stack(
        [
            np.asarray(forward(model.params, model.config, jnp.asarray(chunk)[None], activations=activations)[0][0])
            for chunk in tokens
        ]
    )


def compare(model: Any, chunks: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """One model with both kinds of activations against the reference's logits."""
    both = {kind: logits_of(model, chunks, kind) for kind in BOTH}
    sums: dict[str, list[np.ndarray]] = {}

    def add(key: str, values: np.ndarray) -> None:
        sums.setdefault(key, []).append(np.asarray(values, np.float64))

    first = CONTEXT // 2
    for i, chunk in enumerate(chunks):
        target = log_softmax(reference[i])
        logs = {kind: log_softmax(both[kind][i]) for kind in BOTH}
        for kind, log in {**logs, "reference": target}.items():
            add(f"nll_{kind}", -log[np.arange(first, CONTEXT - 1), chunk[first + 1 :]])
        for kind, log in logs.items():
            add(f"kld_{kind}", divergence(target, log))
            add(f"same_top_{kind}", log.argmax(-1) == target.argmax(-1))
        add("kld_int8_to_float", divergence(logs["float"], logs["int8"]))
        add("same_top_int8_to_float", logs["int8"].argmax(-1) == logs["float"].argmax(-1))
    means = {key: float(np.concatenate(values).mean()) for key, values in sums.items()}
    for kind in (*BOTH, "reference"):
        means[f"ppl_{kind}"] = float(np.exp(means.pop(f"nll_{kind}")))
    return means


def chunks_of(model: Any, text: str, count: int) -> np.ndarray:
    """The first chunks of a text, int32 [count or fewer, CONTEXT]."""
    ids = np.asarray(model.encode(text), np.int32)
    found = min(count, len(ids) // CONTEXT)
    if not found:
        raise SystemExit(f"expected a text of at least {CONTEXT} tokens, got {len(ids)}")
    return ids[: found * CONTEXT].reshape(found, CONTEXT)


def quality(files: list[Path], reference: Path, text: Path, count: int) -> list[dict[str, Any]]:
    """A row for each file, against the float file of the same weights, and for each type of the embedded model."""
    import qjax

    def row(name: str, model: Any, chunks: np.ndarray, target: np.ndarray) -> dict[str, Any]:
        print(name, file=sys.stderr, flush=True)
        return {"model": name, "chunks": len(chunks), **compare(model, chunks, target)}

    rows = []
    if files:
        float_model = qjax.load(reference)
        chunks = chunks_of(float_model, text.read_text(encoding="utf-8"), count)
        target = logits_of(float_model, chunks, "float")
        rows += [row(path.stem, qjax.load(path), chunks, target) for path in files]
    float_model = qjax.load("embedded")
    chunks = chunks_of(float_model, Path(heapq.__file__).read_text(encoding="utf-8"), count)
    target = logits_of(float_model, chunks, "float")
    return rows + [
        row(f"embedded {name}", qjax.load("embedded", quantize=name), chunks, target) for name in EMBEDDED_TYPES
    ]


def speed(shape: str, types: list[str], tokens: int, rounds: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Decoding with both kinds of activations: in each round one sample of each, who goes first alternates."""
    rows = []
    for name in types:
        worker = Worker("qjax", str(model_file(folder, shape, name)), threads)
        samples: dict[str, list[float]] = {kind: [] for kind in BOTH}
        for i in range(rounds):
            for kind in BOTH[:: -1 if i % 2 else 1]:
                samples[kind].append(worker.ask("tg", tokens, kind))
        worker.close()
        print(name, samples, file=sys.stderr, flush=True)
        medians = {kind: statistics.median(samples[kind]) for kind in BOTH}
        rows.append({"type": name, **medians, "ratio": paired_ratio(*samples.values()), "samples": samples})
    return rows


def default_of(ratios: dict[str, float]) -> str:
    """The activations that ship, from float's speed over int8's for each type: one default for all types."""
    return "float" if min(ratios.values()) >= FLOAT_IF_ABOVE else "int8"


def report(result: dict[str, Any]) -> str:
    """Both tables and what they decide."""
    parts = [f"{result['machine']}, qjax{result['commit']}"]
    if rows := result["quality"]:
        head = ["model", "KLD float", "KLD int8", "int8 to float", "ppl f16", "ppl float", "ppl int8"]
        head += ["same top float", "same top int8"]
        cells = [
            [row["model"]]
            + [f"{row[key]:.6f}" for key in ("kld_float", "kld_int8", "kld_int8_to_float")]
            + [f"{row[key]:.4f}" for key in ("ppl_reference", "ppl_float", "ppl_int8")]
            + [f"{100 * row[key]:.2f} %" for key in ("same_top_float", "same_top_int8")]
            for row in rows
        ]
        parts += ["", table(head, cells)]
    if rows := result["speed"]:
        head = ["type", "float tok/s", "int8 tok/s", "float / int8"]
        cells = [[row["type"], f"{row['float']:.2f}", f"{row['int8']:.2f}", f"{row['ratio']:.2f}x"] for row in rows]
        parts += ["", table(head, cells)]
        rule = f"float where every type keeps {100 * FLOAT_IF_ABOVE:.0f} % of int8's speed"
        parts += ["", f"the default by the rule ({rule}): {result['default']}"]
    return "\n".join(parts)


def main() -> None:
    shared = Path(__file__).resolve().parents[2] / "shared"
    interop = Path(os.environ.get("QJAX_INTEROP", shared / "interop"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default=str(interop / "tiny-*.gguf"), help="a glob; none found: the embedded model")
    parser.add_argument("--reference", type=Path, default=interop / "tiny-f16.gguf", help="the same weights in floats")
    parser.add_argument("--text", type=Path, default=interop / "heldout.txt")
    parser.add_argument("--chunks", type=int, default=8, help="0: no table of quality")
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--types", nargs="+", default=list(SPEED_TYPES))
    parser.add_argument("--tg", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="0: no table of speed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where made-up weights are kept; else they are made and removed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    files = [Path(path) for path in sorted(glob.glob(args.files))]  # noqa: PTH207, a whole pattern
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = speed(args.shape, args.types if args.rounds else [], args.tg, args.rounds, args.threads, folder)
    result = {
        "command": sys.argv,
        "machine": machine(Path("/proc/cpuinfo")),
        "commit": commit(),
        "speed": rows,
        "default": default_of({row["type"]: row["ratio"] for row in rows}) if rows else None,
        "quality": quality(files, args.reference, args.text, args.chunks) if args.chunks else [],
    }
    print(report(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
