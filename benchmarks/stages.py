"""What stages cost and gain: decoding through several stages on one CPU, and through processes with microbatches.

    python benchmarks/stages.py                  # one stage and four, on one device and on four virtual ones
    python benchmarks/stages.py --processes 2    # a process a core: rows in one group, and in as many as processes
    python benchmarks/stages.py --processes 2 --profile benchmarks/microbatches.png     # and who computes when

Made-up weights of a known shape; rounds take turns, medians and their ratios are shown.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import overlap

SAME, APART = "4 stages, one device", "4 stages, four devices"


def plan_of(layers: int, places: list[str]) -> Any:
    from qjax.pipeline import Device, Plan, StagePlan

    bounds = np.linspace(0, layers, len(places) + 1).astype(int).tolist()
    stages = tuple(StagePlan(range(a, b), (name,)) for a, b, name in zip(bounds[:-1], bounds[1:], places, strict=True))
    devices = tuple(Device(name, 1 << 40, 1e10, 1e12, 1e10, 1e-6) for name in dict.fromkeys(places))
    return Plan(stages, devices, context=512, batch=1)


def rate(
    executor: Any, prompts: list[list[int]], tokens: int, microbatches: int | None = None, trace: Path | None = None
) -> float:
    """Tokens a second of all rows, from the second token on; trace: a folder for JAX's profiler, from there on too."""
    from qjax.generate import generate_ids

    steps = generate_ids(executor, prompts, max_tokens=tokens + 2, microbatches=microbatches)
    next(steps)
    next(steps)
    with nullcontext() if trace is None else overlap.traced(trace):
        start = time.perf_counter()
        count = sum(1 for _ in steps)
        return count * len(prompts) / (time.perf_counter() - start)


def staged(shape: str, mix: str, tokens: int, rounds: int) -> dict[str, list[float]]:
    import jax

    from qjax.evaluate.shapes import shape_of
    from qjax.evaluate.synthetic import synthetic_params
    from qjax.kernels import default_activations
    from qjax.pipeline import Placing, one_stage

    config = shape_of(shape).config
    params = synthetic_params(config, mix)
    executors: dict[str, Any] = {"1 stage": one_stage(params, config, default_activations())}
    executors[SAME] = Placing(plan_of(config.layers, ["cpu:0"] * 4), config, False).executor(params)
    placing = Placing(plan_of(config.layers, [f"cpu:{i}" for i in range(4)]), config, False)
    apart = synthetic_params(config, mix, lay_out=placing.lay_out, place=placing.place)
    executors[APART] = placing.executor(jax.block_until_ready(apart))
    found: dict[str, list[float]] = {name: [] for name in executors}
    for executor in executors.values():
        rate(executor, [[1]], 2)
    for number in range(rounds):
        for name in list(executors)[:: -1 if number % 2 else 1]:
            found[name].append(rate(executors[name], [[1]], tokens))
    return found


def worker(model: str, plan: str, out: str, traces: str, rows: int, tokens: int, rounds: int) -> None:
    """One of the processes; traces: a folder for these, or ""."""
    from qjax.pipeline.distributed import join

    joined = join()
    import qjax

    executor = qjax.load(model, plan=plan).executor()
    prompts, count = [[1 + i] for i in range(rows)], joined[1] if joined else 1
    found: dict[str, list[float]] = {"1": [], str(count): []}
    for groups in found:
        rate(executor, prompts, 2, int(groups))
    for number in range(rounds):
        for groups in list(found)[:: -1 if number % 2 else 1]:
            found[groups].append(rate(executor, prompts, tokens, int(groups)))
    for groups in found if traces else ():
        rate(executor, prompts, tokens, int(groups), Path(traces, groups, str(joined[0] if joined else 0)))
    if not joined or joined[0] == 0:
        Path(out).write_text(json.dumps(found))


def processes(args: argparse.Namespace) -> dict[str, list[float]]:
    from qjax.evaluate.shapes import shape_of
    from qjax.evaluate.synthetic import save_synthetic
    from qjax.pipeline import write_plan
    from qjax.runs.launch import launch

    shape = shape_of(args.shape)
    with tempfile.TemporaryDirectory() as folder:
        model, plan, out = (Path(folder) / name for name in ("model.gguf", "plan.yaml", "out.json"))
        save_synthetic(model, shape, args.type)
        write_plan(plan, plan_of(shape.config.layers, ["cpu:0"] * args.processes))
        sizes = [str(n) for n in (args.rows, args.tokens, args.rounds)]
        traces = Path(folder, "traces") if args.profile else ""
        command = [sys.executable, __file__, "--worker", str(model), str(plan), str(out), str(traces), *sizes]
        launch(command, args.processes, pin=True, program=())
        found = json.loads(out.read_text())
        if args.profile:
            mine = lambda groups: [overlap.busy(Path(traces, groups, str(i))) for i in range(args.processes)]
            spans = {f"{args.rows} rows in {groups} group(s)": mine(groups) for groups in found}
            # About four tokens of all rows.
            overlap.picture(spans, args.profile, 4 * args.rows / statistics.median(found["1"]))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8, help="of --processes")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--profile", type=Path, help="of --processes: draw who computes when into this file")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker[:4], *map(int, args.worker[4:]))
        return
    if args.processes:
        found = processes(args)
        label = lambda name: f"{args.processes} processes of a core, {args.rows} rows in {name} group(s)"
    else:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
        found = staged(args.shape, args.type, args.tokens, args.rounds)
        label = str
    first = statistics.median(next(iter(found.values())))
    print(f"{args.shape}, {args.type}, {args.tokens} tokens, medians of {args.rounds} rounds\n")
    for name, rates in found.items():
        median = statistics.median(rates)
        print(f"{label(name):60} {median:8.2f} tokens/s  {median / first:.3f}x")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
