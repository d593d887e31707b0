"""The commands that measure: inspect, perplexity, compare, bench."""

import argparse
from pathlib import Path

from qjax.cli.arguments import MODEL_HELP, Commands, add_compute, add_json, add_kv_cache, add_plan, natural, positive
from qjax.errors import QjaxError

WEIGHTS_ALONE = "of x in each product; default: float, which measures the weights alone"
SHAPES = ("tinyllama-1.1b", "llama-7b", "llama-13b")


def add(commands: Commands) -> None:
    """Their arguments."""
    sub = commands.add(
        "inspect",
        "Architecture, tensors, types and memory of a file.",
        "qjax inspect model.gguf",
        _inspect,
        compiles=False,
    )
    add_json(sub)

    sub = commands.add(
        "perplexity",
        "Perplexity by llama-perplexity's method.",
        "qjax perplexity model.gguf --data wiki.txt",
        _perplexity,
    )
    sub.add_argument("--data", required=True, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--ctx", type=positive, default=512, help="tokens of a chunk; default: 512")
    sub.add_argument("--chunks", type=positive, help="only this many; default: all")
    sub.add_argument("--kl-base", metavar="FILE.kld", help="compare with another model's predictions in this file")
    sub.add_argument("--save-kl-base", action="store_true", help="write that file with this model's predictions")
    add_compute(sub, WEIGHTS_ALONE)
    add_kv_cache(sub)
    add_json(sub)

    sub = commands.add(
        "compare",
        "Models of one vocabulary on one text: size, perplexity and KL divergence to a float one; a table and a plot.",
        "qjax compare f16.gguf q8_0.gguf q4_k_m.gguf q4_0.gguf --data wiki.txt --chunks 40",
        _compare,
        model=False,
    )
    sub.add_argument("models", nargs="+", metavar="model", help=MODEL_HELP)
    sub.add_argument("--data", required=True, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--base", metavar="MODEL", help="what all are compared with; default: the first float model")
    sub.add_argument("--kl-base", metavar="FILE.kld", help="the base's predictions, as --save-kl-base writes them")
    sub.add_argument("--ctx", type=positive, help="tokens of a chunk; default: 512, or those of the --kl-base")
    sub.add_argument("--chunks", type=positive, help="only this many; default: all")
    sub.add_argument(
        "--against", metavar="MODEL", help="bootstrap each model against this one; default: the next larger"
    )
    sub.add_argument("--bootstrap", type=positive, default=10_000, metavar="N", help="resamples; default: 10000")
    sub.add_argument("--activations", choices=("float", "int8"), default="float", help=WEIGHTS_ALONE)
    sub.add_argument("--out", default="out", metavar="FOLDER", help="for compare.png and compare.csv; default: out")
    add_json(sub)

    sub = commands.add(
        "bench",
        "Tokens per second and memory of a file, or of made-up weights of a known shape.",
        "qjax bench --shape tinyllama-1.1b --type q4_k_m --pp 512 --tg 128 --repeat 5",
        _bench,
        model=False,
    )
    sub.add_argument("model", nargs="?", help=MODEL_HELP)
    sub.add_argument("--shape", choices=SHAPES, help="made-up packed weights of this shape")
    sub.add_argument("--type", help="type or mix of the made-up weights; default: q4_0")
    sub.add_argument("--pp", type=natural, default=512, help="prompt tokens; default: 512; 0 skips")
    sub.add_argument("--tg", type=natural, default=128, help="generated tokens; default: 128; 0 skips")
    sub.add_argument("--threads", type=positive, help="default: all cores")
    sub.add_argument("--repeat", type=positive, default=5, help="default: 5")
    sub.add_argument("--save", metavar="FILE", help="write the made-up model as GGUF, and measure nothing")
    sub.add_argument("--kernels", action="store_true", help="say which kernel each tensor takes, and measure nothing")
    add_compute(sub)
    add_plan(sub)
    add_kv_cache(sub, of_plan=True)
    add_json(sub)


def _inspect(args: argparse.Namespace) -> None:
    from qjax.runs.console import emit_json
    from qjax.runs.inspect import inspect, show

    facts = inspect(args.model)
    if args.json:
        emit_json(facts)
    else:
        show(facts)


def _perplexity(args: argparse.Namespace) -> None:
    from qjax.runs import texts
    from qjax.runs.console import emit, emit_json
    from qjax.text.files import read_text

    text = read_text(args.data)
    model = texts.open_model(args.model, quantize=args.quantize)
    activations = args.activations or "float"
    if args.save_kl_base and args.kl_base is None:
        raise QjaxError("--save-kl-base writes the file that --kl-base FILE names")
    result = texts.measure_perplexity(
        model,
        text,
        ctx=args.ctx,
        chunks=args.chunks,
        activations=activations,
        kv_cache=args.kv_cache,
        kl_base=args.kl_base,
        save_kl_base=args.save_kl_base,
    )
    if args.json:
        emit_json(result)
    else:
        shown = f"PPL = {result['perplexity']:.4f} +/- {result['stderr']:.5f}"
        emit(f"{shown} over {result['tokens']} tokens in {result['seconds']:.1f} s\n")
        if "mean_kld" in result:
            emit(
                f"base PPL = {result['base_perplexity']:.4f}; KL divergence: mean {result['mean_kld']:.6f} "
                f"+/- {result['kld_stderr']:.6f}, median {result['median_kld']:.6f}, 99 % "
                f"{result['percentiles']['99']:.6f}, max {result['max_kld']:.6f}; RMS dp "
                f"{100 * result['rms_dp']:.3f} %; same top {100 * result['same_top']:.3f} %\n"
            )


def _compare(args: argparse.Namespace) -> None:
    from qjax.runs.compare import compare_files, show
    from qjax.runs.console import emit_json
    from qjax.text.files import read_text

    result = compare_files(
        args.models,
        read_text(args.data),
        Path(args.out),
        title=Path(args.data).name,
        base=args.base,
        kl_base=args.kl_base,
        ctx=args.ctx,
        chunks=args.chunks,
        against=args.against,
        activations=args.activations,
        resamples=args.bootstrap,
    )
    if args.json:
        emit_json(result)
    else:
        show(result)


def _bench(args: argparse.Namespace) -> None:
    from qjax.runs.bench import bench, kernels, save, show, show_kernels
    from qjax.runs.console import emit_json

    if (args.model is None) == (args.shape is None):
        raise QjaxError("give a model or --shape, one of them")
    if args.shape is None and args.type is not None:
        raise QjaxError("--type is for made-up weights: give --shape, or open the file with --quantize")
    if args.shape is not None and args.quantize is not None:
        raise QjaxError("--quantize is for a file: made-up weights have the type that --type names")
    if args.plan is not None and (args.shape is not None or args.kernels):
        raise QjaxError("--plan is for the speed of a file: make one with --save, or leave --plan out")
    type_name = args.type or "q4_0"
    if args.save is not None:
        if args.shape is None:
            raise QjaxError("--save writes made-up weights: give --shape, or use `qjax convert` for a file")
        save(args.shape, type_name, args.save)
        if args.json:
            emit_json({"path": args.save, "shape": args.shape, "type": type_name})
        return
    if args.kernels:
        found = kernels(
            args.model, shape=args.shape, type_name=type_name, quantize=args.quantize, activations=args.activations
        )
        if args.json:
            emit_json(found)
        else:
            show_kernels(found)
        return
    result = bench(
        args.model,
        shape=args.shape,
        type_name=type_name,
        quantize=args.quantize,
        pp=args.pp,
        tg=args.tg,
        repeat=args.repeat,
        threads=args.threads,
        activations=args.activations,
        kv_cache=args.kv_cache,
        plan=args.plan,
    )
    if args.json:
        emit_json(result)
    else:
        show(result)
