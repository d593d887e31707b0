"""The commands that make files: convert, quantize."""

import argparse

from qjax.cli.arguments import Commands, add_json
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Their arguments."""
    sub = commands.add(
        "convert",
        "Rewrite a GGUF file, or quantize a float one.",
        "qjax convert f16.gguf q8.gguf --type q8_0",
        _convert,
    )
    sub.add_argument("target", help="the file to write")
    sub.add_argument("--type", help="quantize float matrices to this type; default: keep every byte")
    add_json(sub)

    sub = commands.add(
        "quantize",
        "Make a quantized GGUF file from a float one, with llama.cpp's mixes.",
        "qjax quantize f16.gguf -o q4_k_m.gguf --type q4_k_m --imatrix imatrix.gguf",
        _quantize,
    )
    sub.add_argument("-o", "--output", metavar="FILE", help="the file to write; not needed with --dry-run")
    sub.add_argument("--type", required=True, help="a mix such as q4_k_m, q3_k_s, q6_k or q8_0")
    sub.add_argument("--imatrix", metavar="FILE", help="an importance matrix of llama-imatrix")
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
    sub.add_argument("--allow-requantize", action="store_true", help="take a file that is quantized already")
    sub.add_argument("--dry-run", action="store_true", help="show types and sizes, read no weight")
    add_json(sub)


def _convert(args: argparse.Namespace) -> None:
    from qjax.api import convert
    from qjax.runs.console import console, emit_json, progress_bar

    with progress_bar(f"writing {args.target}") as advance:
        path = convert(args.model, args.target, quantize=args.type, progress=lambda _: advance())
    if args.json:
        emit_json({"path": str(path), "bytes": path.stat().st_size})
    else:
        console.print(f"wrote {path}", markup=False)


def _quantize(args: argparse.Namespace) -> None:
    from qjax.formats.gguf.plan import Wish, override
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
    with progress_bar(f"writing {args.output}") as advance:
        result = quantize_file(
            args.model,
            args.output,
            wish,
            imatrix=args.imatrix,
            requantize=args.allow_requantize,
            effort=args.effort,
            progress=lambda name: advance(note=name),
        )
    if args.json:
        emit_json(result)
    else:
        size = f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight"
        console.print(f"wrote {result['path']}: {size}", markup=False)
