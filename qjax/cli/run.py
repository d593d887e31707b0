"""The commands that run whole jobs: demo, run."""

import argparse
from pathlib import Path

from qjax.cli.arguments import Commands, add_json


def add(commands: Commands) -> None:
    """Their arguments."""
    sub = commands.add(
        "demo", "The embedded model at several types: memory, perplexity, speed.", "qjax demo", _demo, model=False
    )
    sub.add_argument("--out", default="out", metavar="FOLDER", help="where the plot goes; default: out")
    add_json(sub)

    sub = commands.add(
        "run",
        "Do what a YAML file says: quantize a model, or train the embedded one.",
        "qjax run configs/quantize.yaml",
        _run,
        model=False,
    )
    sub.add_argument("config", help="a YAML file with a 'kind'")
    sub.add_argument("--fresh", action="store_true", help="start anew rather than resume")


def _demo(args: argparse.Namespace) -> None:
    from qjax.runs.console import emit_json
    from qjax.runs.demo import demo

    result = demo(Path(args.out), as_json=args.json)
    if args.json:
        emit_json(result)


def _run(args: argparse.Namespace) -> None:
    from qjax.runs import run
    from qjax.runs.console import console

    console.print(f"made {run(args.config, resume=not args.fresh)}", markup=False)
