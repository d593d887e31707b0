"""The command that says where a model's layers lie: plan."""

import argparse

from qjax.cli.arguments import MODEL_HELP, Commands, add_json, positive
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "plan",
        "Place a model's layers on devices, by its headers alone: what lies where, how fast it will be, what fits.",
        'qjax plan 7b --type q4_k_m --devices "cuda:0=4GiB,cpu:0=16GiB" --ctx 2048 --batch 2 -o plan.yaml\n'
        "  qjax plan model.gguf --plan plan.yaml",
        _plan,
        model=False,
        compiles=False,
    )
    sub.add_argument("model", help=f"{MODEL_HELP}; or a shape: 1b, 7b, 13b")
    sub.add_argument(
        "--devices",
        metavar="NAME=SIZE,...",
        help="memory of each that may be used, such as cuda:0=8GiB,cpu:0=16GiB, with @900GB/s for how fast it reads "
        "weights; default: the devices here, measured",
    )
    sub.add_argument("--ctx", type=positive, help="tokens of a text, prompt included; default: 4096 or the model's")
    sub.add_argument("--batch", type=positive, help="texts at a time; default: 1")
    sub.add_argument("--type", help="a type or mix that float matrices are quantized to while loading, e.g. q4_k_m")
    sub.add_argument("--mode", metavar="MODE", help="auto, or 'ratio 3:1' of the layers' bytes; default: auto")
    sub.add_argument("--plan", metavar="FILE.yaml", help="look at this plan; other options replace what it says")
    sub.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        help="of auto: a token's time, or all texts'; default: latency",
    )
    sub.add_argument(
        "--microbatches", type=positive, metavar="N", help="parts of the batch in different stages at a time"
    )
    sub.add_argument("--kv-cache", choices=("float", "int8"), help="what keys and values are kept as; default: float")
    sub.add_argument("-o", "--output", metavar="PLAN.yaml", help="write the plan")
    add_json(sub)


def _plan(args: argparse.Namespace) -> None:
    from qjax.runs.console import emit_json
    from qjax.runs.plan import plan_model, show

    facts = plan_model(
        args.model,
        devices=args.devices,
        plan_file=args.plan,
        output=args.output,
        mode=args.mode,
        objective=args.objective,
        context=args.ctx,
        batch=args.batch,
        type=args.type,
        microbatches=args.microbatches,
        cache=args.kv_cache,
    )
    if args.json:
        emit_json(facts)
    else:
        show(facts)
    if not facts["feasible"]:
        raise QjaxError(facts["error"])
