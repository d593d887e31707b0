"""The command that makes a quantized file: quantize."""

import argparse
from pathlib import Path
from typing import Any

from qjax.cli.arguments import Commands, add_json, add_output, byte_count, named, number, positive
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "quantize",
        "Make a quantized GGUF file from a float one or a Hugging Face folder, with llama.cpp's mixes.",
        "qjax quantize f16.gguf -o q4_k_m.gguf --type q4_k_m --imatrix imatrix.gguf",
        _quantize,
    )
    sub.add_argument("-o", "--output", metavar="FILE", help="the file to write; not needed with --dry-run")
    sub.add_argument("--type", help="a mix such as q4_k_m or q8_0, or a .yaml file with one of your own")
    sub.add_argument("--imatrix", metavar="FILE", help="an importance matrix of llama-imatrix or `qjax calibrate`")
    sub.add_argument(
        "--effort",
        choices=["normal", "high"],
        default="normal",
        help="normal: llama.cpp's blocks; high: blocks with less error, for several times the time; default: normal",
    )
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
    sub.add_argument(
        "--tensor-type-file",
        action="append",
        dest="tensor_type",
        type=Path,
        metavar="FILE",
        help="REGEX=TYPE of a file, apart by spaces or lines (or a YAML list under tensor_types)",
    )
    budget = sub.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-bpw", type=number, metavar="BITS", help="choose types that lose least with so many bits a weight"
    )
    budget.add_argument(
        "--target-size", type=byte_count, metavar="SIZE", help="... with a file of at most this size, such as 3.5GiB"
    )
    sub.add_argument(
        "--data",
        metavar="FILE",
        help="with a target: UTF-8 text to look at the model on; default: text that it writes itself",
    )
    sub.add_argument("--chunks", type=positive, help="of 512 tokens, of that text; default: 8")
    sub.add_argument("--types", metavar="TYPE,TYPE", help="with a target: the types to choose from")
    sub.add_argument("--allow-requantize", action="store_true", help="take a file that is quantized already")
    add_output(sub)
    sub.add_argument(
        "--dry-run", action="store_true", help="show types and sizes, read no weight (with a target: write none)"
    )
    add_json(sub)


def _quantize(args: argparse.Namespace) -> None:
    from qjax.formats.gguf.plan import Wish, overrides
    from qjax.runs.console import console, emit_json, megabytes
    from qjax.runs.quantize import show

    if args.output is None and not args.dry_run:
        raise QjaxError("give the file to write by -o FILE, or ask with --dry-run what it would hold")
    budgeted = args.target_bpw is not None or args.target_size is not None
    if args.type is None and not budgeted:
        raise QjaxError("give --type, or a budget by --target-bpw or --target-size")
    if budgeted and args.pure:
        raise QjaxError("--pure is of a mix: a budget chooses each tensor's type")
    if not budgeted and any(given is not None for given in (args.data, args.types, args.chunks)):
        raise QjaxError("--data, --types and --chunks are for a budget: give --target-bpw or --target-size")
    wish = Wish(
        args.type or "q4_k_m",
        pure=args.pure,
        output_type=args.output_tensor_type,
        embedding_type=args.token_embedding_type,
        overrides=overrides(args.tensor_type),
        imatrix=args.imatrix is not None,
    )
    result = (_within_budget if budgeted else _by_mix)(args, wish)
    if args.json:
        emit_json(result)
        return
    if args.dry_run:
        show(result)
    else:
        summary = f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight"
        console.print(f"wrote {named(result['files'])}: {summary}", markup=False)
    if budgeted:
        measured = f", {result['measured_kld']:.5f} measured" if "measured_kld" in result else ""
        console.print(f"KL divergence to the source: {result['expected_kld']:.5f} expected{measured}", markup=False)


def _by_mix(args: argparse.Namespace, wish: Any) -> dict[str, Any]:
    from qjax.formats.locate import locate
    from qjax.kernels.native import return_when_freed
    from qjax.runs.console import progress_bar
    from qjax.runs.quantize import dry_run, quantize_file

    if args.dry_run:
        return dry_run(args.model, wish, requantize=args.allow_requantize)
    source = locate(args.model)
    return_when_freed()
    with progress_bar(f"writing {args.output}") as advance:
        return quantize_file(
            source,
            args.output,
            wish,
            imatrix=args.imatrix,
            requantize=args.allow_requantize,
            split_max_bytes=args.split_max_size,
            fresh=args.fresh,
            effort=args.effort,
            progress=lambda name: advance(note=name),
        )


def _within_budget(args: argparse.Namespace, wish: Any) -> dict[str, Any]:
    from qjax.formats.gguf.types import type_named
    from qjax.runs.budget import CHUNKS, Budget, quantize_within

    kinds = None if args.types is None else [type_named(kind.strip()) for kind in args.types.split(",")]
    budget = Budget(args.target_bpw, args.target_size, args.data, args.chunks or CHUNKS, kinds)
    return quantize_within(
        args.model,
        None if args.dry_run else args.output,
        wish,
        budget,
        imatrix=args.imatrix,
        requantize=args.allow_requantize,
        effort=args.effort,
        split_max_bytes=args.split_max_size,
        fresh=args.fresh,
    )
