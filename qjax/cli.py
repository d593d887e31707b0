"""The command line: arguments -> runs. Exit codes: 0 done, 2 bad input or usage, 1 our fault."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qjax import __version__
from qjax.cache import cache_root
from qjax.errors import QjaxError, QjaxWarning

SHAPES = ("tinyllama-1.1b", "llama-7b", "llama-13b")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all errors are said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"qjax: error: {message} (`{self.prog} --help` tells more)\n")


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


MODEL_HELP = "a .gguf file, a folder with one, 'embedded', or a Hub id owner/name[:file]"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qjax", description="Open, make and run quantized LLMs with their weights still packed, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"qjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, summary: str, example: str, *, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=_Help
        )
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        if model:
            sub.add_argument("model", help=MODEL_HELP)
        return sub

    def json_flag(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")

    fastest = "of x in each product; default: int8 on a CPU with native kernels, else float"

    def compute(sub: argparse.ArgumentParser, activations: str = fastest) -> None:
        sub.add_argument("--activations", choices=("float", "int8"), help=activations)
        sub.add_argument("--quantize", metavar="TYPE", help="quantize float matrices while loading, e.g. q8_0")

    def sampling(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("-n", "--max-tokens", type=_positive, help="default: 128, or what the context leaves")
        sub.add_argument("--temperature", type=_number, default=0.8, help="0 is greedy; default: 0.8")
        sub.add_argument("--top-k", type=_natural, default=0, help="default: 0, all")
        sub.add_argument("--top-p", type=_number, default=1.0, help="default: 1, all")
        sub.add_argument("--min-p", type=_number, default=0.0, help="default: 0, all")
        sub.add_argument("--repetition-penalty", type=_number, default=1.0, help="default: 1, none")
        sub.add_argument("--seed", type=_natural, default=0)
        sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")

    sub = command("generate", "Continue a prompt.", 'qjax generate embedded -p "def main(" -n 48 --temperature 0')
    sub.add_argument("-p", "--prompt", help="the text to continue")
    sub.add_argument("-f", "--file", help="read the prompt from a file ('-': standard input)")
    sub.add_argument("--echo", action="store_true", help="print the prompt too")
    sampling(sub)
    compute(sub)
    json_flag(sub)

    sub = command("chat", "Talk with a model, by its chat template.", "qjax chat model.gguf --system 'Be brief.'")
    sub.add_argument("--system", help="the system message")
    sampling(sub)
    compute(sub)

    sub = command("tokenize", "Token ids of a text.", "qjax tokenize embedded --file README.md --json")
    sub.add_argument("-p", "--prompt", help="the text")
    sub.add_argument("--file", help="a UTF-8 file ('-': standard input)")
    sub.add_argument("--bos", action="store_true", help="put BOS first, if the vocabulary has one")
    sub.add_argument("--special", action="store_true", help="read the text of control tokens as these tokens")
    json_flag(sub)

    sub = command("inspect", "Architecture, tensors, types and memory of a file.", "qjax inspect model.gguf")
    json_flag(sub)

    sub = command(
        "perplexity", "Perplexity by llama-perplexity's method.", "qjax perplexity model.gguf --data wiki.txt"
    )
    sub.add_argument("--data", required=True, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--ctx", type=_positive, default=512, help="tokens of a chunk; default: 512")
    sub.add_argument("--chunks", type=_positive, help="only this many; default: all")
    sub.add_argument("--kl-base", metavar="FILE.kld", help="compare with another model's predictions in this file")
    sub.add_argument("--save-kl-base", action="store_true", help="write that file with this model's predictions")
    compute(sub, "of x in each product; default: float, which measures the weights alone")
    json_flag(sub)

    sub = command(
        "bench",
        "Tokens per second and memory of a file, or of made-up weights of a known shape.",
        "qjax bench --shape tinyllama-1.1b --type q4_k_m --pp 512 --tg 128 --repeat 5",
        model=False,
    )
    sub.add_argument("model", nargs="?", help=MODEL_HELP)
    sub.add_argument("--shape", choices=SHAPES, help="made-up packed weights of this shape")
    sub.add_argument("--type", help="type or mix of the made-up weights; default: q4_0")
    sub.add_argument("--pp", type=_natural, default=512, help="prompt tokens; default: 512; 0 skips")
    sub.add_argument("--tg", type=_natural, default=128, help="generated tokens; default: 128; 0 skips")
    sub.add_argument("--threads", type=_positive, help="default: all cores")
    sub.add_argument("--repeat", type=_positive, default=5, help="default: 5")
    sub.add_argument("--save", metavar="FILE", help="write the made-up model as GGUF, and measure nothing")
    sub.add_argument("--kernels", action="store_true", help="say which kernel each tensor takes, and measure nothing")
    compute(sub)
    json_flag(sub)

    sub = command(
        "convert", "Rewrite a GGUF file, or quantize a float one.", "qjax convert f16.gguf q8.gguf --type q8_0"
    )
    sub.add_argument("target", help="the file to write")
    sub.add_argument("--type", help="quantize float matrices to this type; default: keep every byte")
    json_flag(sub)

    sub = command(
        "quantize",
        "Make a quantized GGUF file from a float one, with llama.cpp's mixes.",
        "qjax quantize f16.gguf -o q4_k_m.gguf --type q4_k_m --imatrix imatrix.gguf",
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
    sub.add_argument("--dry-run", action="store_true", help="show types and sizes, read no weight")
    json_flag(sub)

    sub = command("demo", "The embedded model at several types: memory, perplexity, speed.", "qjax demo", model=False)
    sub.add_argument("--out", default="out", metavar="FOLDER", help="where the plot goes; default: out")
    json_flag(sub)

    sub = command(
        "run", "Do what a YAML file says, e.g. train the embedded model.", "qjax run configs/embedded.yaml", model=False
    )
    sub.add_argument("config", help="a YAML file with a 'kind'")
    sub.add_argument("--fresh", action="store_true", help="start anew rather than resume")
    return parser


def _cache_compilations() -> None:
    """Compiled programs are kept between runs: time to first token counts.

    JAX's own variable for the folder, if set, is left alone; QJAX_CACHE names another, and "off" turns it off.
    """
    import jax

    folder = cache_root()
    if folder is None or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _prompt(args: argparse.Namespace) -> str:
    from qjax.runs.texts import read_text

    if (args.prompt is None) == (args.file is None):
        raise QjaxError("give the text by -p TEXT or by --file FILE, one of them")
    return args.prompt if args.file is None else read_text(args.file)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "activations",
    )
    return {name: getattr(args, name) for name in names}


def _generate(args: argparse.Namespace) -> None:
    from qjax.runs import texts
    from qjax.runs.console import console, emit_json

    prompt = _prompt(args)
    model = texts.open_model(args.model, quantize=args.quantize)
    result = texts.generate(model, prompt, as_json=args.json, echo=args.echo, **_sampling(args))
    if args.json:
        emit_json(result)
    else:
        facts = [f"{len(result['ids'])} tokens"]
        # Of two tokens no speed is known.
        if result["tokens_per_second"]:
            facts.append(f"{result['tokens_per_second']:.1f} tokens/s")
        facts.append(f"first after {result['first_token_seconds']:.2f} s")
        console.print(f"[{', '.join(facts)}]", style="dim", markup=False)


def _chat(args: argparse.Namespace) -> None:
    from qjax.runs import texts

    texts.chat(texts.open_model(args.model, quantize=args.quantize), args.system, **_sampling(args))


def _tokenize(args: argparse.Namespace) -> None:
    from qjax.runs.texts import tokenize

    tokenize(args.model, _prompt(args), bos=args.bos, parse_special=args.special, as_json=args.json)


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

    text = texts.read_text(args.data)
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


def _bench(args: argparse.Namespace) -> None:
    from qjax.runs.bench import bench, kernels, save, show, show_kernels
    from qjax.runs.console import emit_json

    if (args.model is None) == (args.shape is None):
        raise QjaxError("give a model or --shape, one of them")
    if args.shape is None and args.type is not None:
        raise QjaxError("--type is for made-up weights: give --shape, or open the file with --quantize")
    if args.shape is not None and args.quantize is not None:
        raise QjaxError("--quantize is for a file: made-up weights have the type that --type names")
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
    )
    if args.json:
        emit_json(result)
    else:
        show(result)


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
            progress=lambda name: advance(note=name),
        )
    if args.json:
        emit_json(result)
    else:
        size = f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight"
        console.print(f"wrote {result['path']}: {size}", markup=False)


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


COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "tokenize": _tokenize,
    "inspect": _inspect,
    "perplexity": _perplexity,
    "bench": _bench,
    "convert": _convert,
    "quantize": _quantize,
    "demo": _demo,
    "run": _run,
}
# These read a file's header only; the others compile.
NO_COMPILATION = ("tokenize", "inspect")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"qjax: warning: {_one_line(message)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        # What one command has warned of, the next one in this process warns of again.
        warnings.simplefilter("default", QjaxWarning)
        warnings.showwarning = _show_warning
        return _exit_code(args)


def _exit_code(args: argparse.Namespace) -> int:
    try:
        if args.command == "bench" and args.threads is not None:
            from qjax.evaluate.speed import limit_threads

            limit_threads(args.threads)
        if args.command not in NO_COMPILATION:
            _cache_compilations()
        COMMANDS[args.command](args)
        return 0
    except BrokenPipeError:
        # Who reads our output has had enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("qjax: interrupted", file=sys.stderr)
        return 130
    except (QjaxError, OSError) as error:
        if args.debug:
            raise
        print(f"qjax: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        name = type(error).__name__
        print(f"qjax: internal error: {name}: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
