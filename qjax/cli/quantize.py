"""The command that makes a quantized model: quantize, by llama.cpp's mixes or by a method with calibration."""

import argparse
from pathlib import Path
from typing import Any

from qjax.cli.arguments import Commands, add_json, add_output, byte_count, named, natural, number, positive
from qjax.errors import QjaxError

# What is of one of the two ways alone, with what it is if it is not given.
_OF_MIXES: dict[str, Any] = {
    "type": None,
    "imatrix": None,
    "effort": "normal",
    "pure": False,
    "output_tensor_type": None,
    "token_embedding_type": None,
    "tensor_type": [],
    "allow_requantize": False,
    "split_max_size": None,
}
_OF_METHODS: dict[str, Any] = dict.fromkeys(
    ("bits", "group_size", "asymmetric", "act_order", "rule", "damp", "steps", "samples", "seq_len", "seed", "format",
     "evaluate", "batch")
)  # fmt: skip


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "quantize",
        "Make a quantized model from a float one: a GGUF file with llama.cpp's mixes, or by a method that looks at "
        "calibration data a folder that vLLM and transformers read.",
        "qjax quantize f16.gguf -o q4_k_m.gguf --type q4_k_m --imatrix imatrix.gguf\n"
        "  qjax quantize HF_FOLDER -o OUT --method gptq --bits 4 --group-size 128 --data text.txt --format gptq",
        _quantize,
    )
    sub.add_argument("-o", "--output", metavar="OUT", help="the file or folder to write; not needed with --dry-run")
    _add_mixes(sub.add_argument_group("llama.cpp's mixes"))
    _add_methods(sub.add_argument_group("methods"))
    shared = sub.add_argument_group("both")
    shared.add_argument(
        "--data",
        metavar="FILE",
        help="calibration text, .jsonl or token file, or wikitext-2; with a target: text to look at the model on (of "
        "mixes, default: text that it writes itself)",
    )
    budget = shared.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-bpw", type=number, metavar="BITS", help="choose what loses least with so many bits a weight"
    )
    budget.add_argument(
        "--target-size", type=byte_count, metavar="SIZE", help="... with weights of at most this size, such as 3.5GiB"
    )
    shared.add_argument("--chunks", type=positive, help="with a target: of 512 tokens, of that text; default: 8")
    shared.add_argument(
        "--types", metavar="TYPE,TYPE", help="with a target: the types, or with a method the schemes, to choose from"
    )
    shared.add_argument(
        "--dry-run", action="store_true", help="show types and sizes, read no weight (with a target: write none)"
    )
    add_output(sub)
    add_json(sub)


def _add_mixes(group: Any) -> None:
    group.add_argument("--type", help="a mix such as q4_k_m or q8_0, or a .yaml file with one of your own")
    group.add_argument("--imatrix", metavar="FILE", help="an importance matrix of llama-imatrix or `qjax calibrate`")
    group.add_argument(
        "--effort",
        choices=["normal", "high"],
        default="normal",
        help="normal: llama.cpp's blocks; high: blocks with less error, for several times the time; default: normal",
    )
    group.add_argument("--pure", action="store_true", help="the mix's main type for every matrix")
    group.add_argument("--output-tensor-type", metavar="TYPE", help="type of output.weight")
    group.add_argument("--token-embedding-type", metavar="TYPE", help="type of token_embd.weight")
    group.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="type of the tensors whose name the expression is found in; the first that fits decides",
    )
    group.add_argument(
        "--tensor-type-file",
        action="append",
        dest="tensor_type",
        type=Path,
        metavar="FILE",
        help="REGEX=TYPE of a file, apart by spaces or lines (or a YAML list under tensor_types)",
    )
    group.add_argument("--allow-requantize", action="store_true", help="take a file that is quantized already")


def _add_methods(group: Any) -> None:
    group.add_argument("--method", help="rtn, gptq, awq, learned or smoothquant")
    group.add_argument("--bits", type=positive, help="2, 3, 4, 5, 6 or 8; default: 4, of smoothquant 8")
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="columns that share a scale, -1 for a row; default: 128, of smoothquant -1",
    )
    flag = argparse.BooleanOptionalAction
    group.add_argument("--asymmetric", action=flag, help="with zero points; default: no, of awq yes")
    group.add_argument("--act-order", action=flag, help="gptq: columns in the order of their importance")
    group.add_argument("--damp", type=number, help="gptq: added to the Hessian's diagonal, as a share of its mean")
    group.add_argument("--steps", type=positive, help="learned: steps a block")
    group.add_argument(
        "--rule",
        action="append",
        metavar="REGEX=SCHEME",
        help="scheme (w8, w4g32-asym) or keep, of matrices in whose GGUF or Hugging Face name the expression is found; "
        "the first that fits decides",
    )
    group.add_argument("--samples", type=positive, help="calibration samples; default: 128")
    group.add_argument("--seq-len", type=positive, metavar="L", help="tokens of each; default: 512")
    group.add_argument("--seed", type=natural, help="of the draw of samples, and of what learned draws; default: 0")
    group.add_argument("--batch", type=positive, help="samples that are run at once; default: 8")
    group.add_argument(
        "--format",
        help="gptq, gptq_v2, awq, compressed-tensors, qjax or gguf; default: gguf if OUT ends so, else qjax",
    )
    group.add_argument(
        "--evaluate", metavar="FILE", help="measure perplexity and divergence on this text, for the model card"
    )


def _refuse(args: argparse.Namespace, options: dict[str, Any], because: str) -> None:
    given = [name for name, default in options.items() if getattr(args, name) != default]
    if given:
        raise QjaxError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: {because}")


def _quantize(args: argparse.Namespace) -> None:
    from qjax.runs.console import console, emit_json, megabytes
    from qjax.runs.quantize import show
    from qjax.runs.quantize_blocks import show as show_schemes

    if args.output is None and not args.dry_run:
        raise QjaxError("give the file to write by -o FILE, or ask with --dry-run what it would hold")
    budgeted = args.target_bpw is not None or args.target_size is not None
    if args.method is not None:
        _refuse(args, _OF_MIXES, "is for llama.cpp's mixes, --method makes none: leave one of them out")
    else:
        _refuse(args, _OF_METHODS, "is for a method: give --method gptq or another one")
    if not budgeted and any(given is not None for given in (args.types, args.chunks)):
        raise QjaxError("--types and --chunks are for a budget: give --target-bpw or --target-size")
    result = _by_method(args, budgeted) if args.method is not None else _by_type(args, budgeted)
    if args.json:
        emit_json(result)
        return
    if args.dry_run:
        (show if args.method is None else show_schemes)(result)
    else:
        summary = f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight"
        written = result.get("files", [result["path"]])
        console.print(f"wrote {named(written)}: {summary}", markup=False)
    if budgeted:
        measured = f", {result['measured_kld']:.5f} measured" if "measured_kld" in result else ""
        console.print(f"KL divergence to the source: {result['expected_kld']:.5f} expected{measured}", markup=False)
    if "mean_kld" in result:
        said = f"perplexity {result['perplexity']:.4f}, KL divergence to the source {result['mean_kld']:.6f}"
        console.print(f"{args.evaluate}: {said}", markup=False)


def _by_type(args: argparse.Namespace, budgeted: bool) -> dict[str, Any]:
    from qjax.formats.gguf.plan import Wish, overrides

    if args.type is None and not budgeted:
        raise QjaxError("give --type, or --method, or a budget by --target-bpw or --target-size")
    if budgeted and args.pure:
        raise QjaxError("--pure is of a mix: a budget chooses each tensor's type")
    if not budgeted and args.data is not None:
        raise QjaxError("--data is for a budget or a method: give --target-bpw, --target-size or --method")
    wish = Wish(
        args.type or "q4_k_m",
        pure=args.pure,
        output_type=args.output_tensor_type,
        embedding_type=args.token_embedding_type,
        overrides=overrides(args.tensor_type),
        imatrix=args.imatrix is not None,
    )
    return (_within_budget if budgeted else _by_mix)(args, wish)


def _by_method(args: argparse.Namespace, budgeted: bool) -> dict[str, Any]:
    from qjax.calibrate.data import SAMPLES, Calibration
    from qjax.calibrate.recipes import recipe_for
    from qjax.kernels.native import return_when_freed
    from qjax.runs.quantize_blocks import Job, output_at, plan_model, quantize_model

    recipe = recipe_for(
        args.method,
        bits=args.bits,
        group_size=args.group_size,
        symmetric=None if args.asymmetric is None else not args.asymmetric,
        rules=args.rule or (),
        act_order=args.act_order,
        damp=args.damp,
        steps=args.steps,
        seed=args.seed,
    )
    job = Job(
        args.model,
        recipe,
        Calibration(args.data, args.samples or SAMPLES, args.seq_len, args.seed or 0),
        batch=args.batch or 8,
        evaluate=args.evaluate,
        budget=_budget(args, None if args.types is None else args.types.split(",")) if budgeted else None,
    )
    if args.dry_run:
        return plan_model(job, args.format or "qjax")
    output = output_at(args.output, args.format, fresh=args.fresh)
    return_when_freed()
    return quantize_model(job, output)


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
    from qjax.runs.budget import quantize_within

    kinds = None if args.types is None else [type_named(kind.strip()) for kind in args.types.split(",")]
    budget = _budget(args, kinds)
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


def _budget(args: argparse.Namespace, kinds: list[str] | None) -> Any:
    from qjax.runs.budget import CHUNKS, Budget

    return Budget(args.target_bpw, args.target_size, args.data, args.chunks or CHUNKS, kinds)
