"""The commands that make files: convert, quantize."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qjax.cli.arguments import Commands, add_json, byte_count
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Their arguments."""
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
    _add_output(sub)
    add_json(sub)

    sub = commands.add(
        "quantize",
        "Make a quantized GGUF file from a float one or a Hugging Face folder, with llama.cpp's mixes.",
        "qjax quantize f16.gguf -o q4_k_m.gguf --type q4_k_m --imatrix imatrix.gguf",
        _quantize,
    )
    sub.add_argument("-o", "--output", metavar="FILE", help="the file to write; not needed with --dry-run")
    sub.add_argument("--type", required=True, help="a mix such as q4_k_m, q3_k_s, q6_k or q8_0")
    sub.add_argument("--imatrix", metavar="FILE", help="an importance matrix of llama-imatrix")
    sub.add_argument("--pure", action="store_true", help="the mix's main type for every matrix")
    sub.add_argument("--output-tensor-type", metavar="TYPE", help="type of output.weight")
    sub.add_argument("--token-embedding-type", metavar="TYPE", help="type of token_embd.weight")
    sub.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="type of the tensors whose name the expression is found in; the first that fits decides",
    )
    sub.add_argument("--allow-requantize", action="store_true", help="take a file that is quantized already")
    _add_output(sub)
    sub.add_argument("--dry-run", action="store_true", help="show types and sizes, read no weight")
    add_json(sub)


def _add_output(sub: argparse.ArgumentParser) -> None:
    """How the file is written."""
    sub.add_argument(
        "--split-max-size",
        type=byte_count,
        metavar="SIZE",
        help="write shards NAME-00001-of-0000N.gguf with up to this size of tensors each, such as 2GiB or 500M",
    )
    sub.add_argument("--fresh", action="store_true", help="begin anew, whatever a killed run has done already")


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
        console.print(f"wrote {_named(files)}", markup=False)


def _quantize(args: argparse.Namespace) -> None:
    from qjax.formats.gguf.plan import Wish, override
    from qjax.formats.locate import locate
    from qjax.kernels.native import return_when_freed
    from qjax.runs.console import console, emit_json, megabytes, progress_bar
    from qjax.runs.quantize import facts, plan_file, quantize_file, show

    wish = Wish(
        args.type,
        pure=args.pure,
        output_type=args.output_tensor_type,
        embedding_type=args.token_embedding_type,
        overrides=[override(text) for text in args.tensor_type],
        imatrix=args.imatrix is not None,
    )
    if args.dry_run:
        result = facts(plan_file(args.model, wish, requantize=args.allow_requantize)[1])
        if args.json:
            emit_json(result)
        else:
            show(result)
        return
    if args.output is None:
        raise QjaxError("give the file to write by -o FILE, or ask with --dry-run what it would hold")
    source = locate(args.model)
    return_when_freed()
    with progress_bar(f"writing {args.output}") as advance:
        result = quantize_file(
            source,
            args.output,
            wish,
            imatrix=args.imatrix,
            requantize=args.allow_requantize,
            split_max_bytes=args.split_max_size,
            fresh=args.fresh,
            progress=lambda name: advance(note=name),
        )
    if args.json:
        emit_json(result)
    else:
        summary = f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight"
        console.print(f"wrote {_named(result['files'])}: {summary}", markup=False)


def _named(files: Sequence[str | Path]) -> str:
    more = len(files) - 1
    return f"{files[0]} and {more} more" if more else str(files[0])
