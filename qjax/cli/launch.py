"""The command that starts several processes of another one: launch."""

import argparse

from qjax.cli.arguments import Commands, positive
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "launch",
        "Run a command in several processes on this host, each with one stage of a plan.",
        "qjax launch -n 2 --pin generate model.gguf --plan plan.yaml -p 'Once'",
        _launch,
        compiles=False,
        model=False,
    )
    sub.add_argument("-n", "--processes", type=positive, required=True, help="how many: as many as the plan has stages")
    sub.add_argument("--pin", action="store_true", help="give each process cores of its own")
    sub.add_argument("--devices", type=positive, help="virtual CPU devices of each process; default: one")
    sub.add_argument("rest", nargs=argparse.REMAINDER, metavar="command ...", help="what each process runs")


def _launch(args: argparse.Namespace) -> None:
    from qjax.runs.launch import launch

    command = args.rest[1:] if args.rest[:1] == ["--"] else args.rest
    if not command or command[0] == "launch":
        raise QjaxError("give the command that each process shall run, such as: qjax launch -n 2 generate ...")
    launch(command, args.processes, pin=args.pin, devices=args.devices)
