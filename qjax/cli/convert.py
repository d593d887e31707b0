"""The command that makes a file of another: convert."""

import argparse

from qjax.cli.arguments import Commands, add_json, add_output, named
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "convert",
        "Write a Hugging Face folder or a GGUF file as GGUF, as it is or quantized.",
        "qjax convert HF_FOLDER -o q4_k_m.gguf --type q4_k_m",
        _convert,
    )
    sub.add_argument("target", nargs="?", help="the file to write; or give it by -o")
    sub.add_argument("-o", "--output", metavar="FILE", help="the file to write")
    sub.add_argument(
        "--type", help="a plain type such as f16 or q8_0 for every float matrix, or a mix; default: as they are"
    )
    add_output(sub)
    add_json(sub)


def _convert(args: argparse.Namespace) -> None:
    from qjax.api import convert
    from qjax.formats.gguf import open_gguf
    from qjax.formats.locate import locate
    from qjax.kernels.native import return_when_freed
    from qjax.runs.console import console, emit_json, progress_bar, say_resumed

    if (args.target is None) == (args.output is None):
        raise QjaxError("give the file to write by -o FILE, or after the model, once")
    target = args.target or args.output
    # Before the bar, since a download has bars of its own.
    source = locate(args.model)
    return_when_freed()
    with progress_bar(f"writing {target}") as advance:
        path = convert(
            source,
            target,
            quantize=args.type,
            split_max_bytes=args.split_max_size,
            fresh=args.fresh,
            progress=lambda _: advance(),
            resumed=say_resumed,
        )
    files = open_gguf(path).shards
    if args.json:
        size = sum(file.stat().st_size for file in files)
        emit_json({"path": str(path), "files": [str(file) for file in files], "bytes": size})
    else:
        console.print(f"wrote {named(files)}", markup=False)
