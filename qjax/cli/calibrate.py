"""The command that runs a model over a text for what quantizers need: calibrate."""

import argparse

from qjax.cli.arguments import MODEL_HELP, Commands, add_json, number, positive
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "calibrate",
        "Make an importance matrix of a model and a text, as llama-imatrix does.",
        "qjax calibrate f16.gguf --data calibration.txt -o imatrix.gguf",
        _calibrate,
        model=False,
    )
    sub.add_argument("model", nargs="?", help=f"{MODEL_HELP}; float or quantized")
    sub.add_argument("--data", metavar="FILE", help="UTF-8 text")
    sub.add_argument("-o", "--output", default="imatrix.gguf", metavar="FILE", help="default: imatrix.gguf")
    sub.add_argument("--ctx", type=positive, default=512, help="tokens of a chunk; default: 512")
    sub.add_argument("--chunks", type=positive, help="only this many; default: all")
    sub.add_argument("--batch", type=positive, default=1, help="chunks that are run at once; default: 1")
    sub.add_argument(
        "--process-output", action="store_true", help="of the output matrix too (token_embd.weight if tied)"
    )
    sub.add_argument(
        "--fisher",
        action="store_true",
        help="by gradients of what the model predicts: what a byte budget needs, and better importances too",
    )
    sub.add_argument("--fresh", action="store_true", help="start anew, whatever FILE.partial holds")
    sub.add_argument(
        "--save-every", type=number, default=30.0, metavar="SECONDS", help="write FILE.partial this often; default: 30"
    )
    instead = sub.add_mutually_exclusive_group()
    instead.add_argument("--merge", nargs="+", metavar="FILE", help="instead: add these matrices of one model up")
    instead.add_argument("--show", metavar="FILE", help="instead: what a matrix looks like")
    add_json(sub)


def _calibrate(args: argparse.Namespace) -> None:
    from qjax.runs.calibrate import calibrate, merge_files, show, statistics_of
    from qjax.runs.console import console, emit_json, progress_bar

    if [args.model is not None, args.merge is not None, args.show is not None].count(True) != 1:
        raise QjaxError("give a model and --data FILE, or --merge FILE..., or --show FILE: one of them")
    if args.show is not None:
        lines = statistics_of(args.show)
        if args.json:
            emit_json({"path": args.show, "inputs": lines})
        else:
            show(lines)
        return
    if args.merge is not None:
        result = merge_files(args.merge, args.output, ctx=args.ctx)
    else:
        if args.fisher and (args.process_output or args.batch != 1):
            raise QjaxError("--fisher looks at all matrices, a chunk at a time: leave --process-output and --batch out")
        if args.data is None:
            raise QjaxError("give the text by --data FILE")
        with progress_bar("calibrating") as advance:
            result = calibrate(
                args.model,
                args.data,
                args.output,
                ctx=args.ctx,
                chunks=args.chunks,
                output=args.process_output,
                batch=args.batch,
                of_gradients=args.fisher,
                fresh=args.fresh,
                save_every=args.save_every,
                progress=lambda done, total, rate: advance(done, total, f"{rate:.0f} tokens/s"),
            )
    if args.json:
        emit_json(result)
    else:
        said = f"wrote {result['path']}: {result['entries']} weights over {result['chunks']} chunks"
        rate = f", {result['tokens_per_second']:.0f} tokens/s" if "seconds" in result else ""
        console.print(f"{said} of {result['ctx']} tokens{rate}", markup=False)
