"""The commands that take or make text: generate, chat, tokenize."""

import argparse
from functools import partial
from typing import Any

from qjax.cli.arguments import Commands, add_compute, add_json, add_kv_cache, add_plan, natural, number, positive
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Their arguments."""
    sub = commands.add(
        "generate", "Continue a prompt.", 'qjax generate embedded -p "def main(" -n 48 --temperature 0', _generate
    )
    sub.add_argument("-p", "--prompt", help="the text to continue")
    sub.add_argument("-f", "--file", help="read the prompt from a file ('-': standard input)")
    sub.add_argument("--echo", action="store_true", help="print the prompt too")
    sub.add_argument(
        "--prompts", metavar="JSONL", help='many prompts: a line {"prompt": "..."} or {"messages": [...]} each'
    )
    sub.add_argument("-o", "--output", metavar="JSONL", help="of --prompts: a line each, in order; resumes if killed")
    sub.add_argument("--rows", type=positive, help="of --prompts: texts at a time; default: 8, or the plan's batch")
    sub.add_argument(
        "--replica",
        action="append",
        default=[],
        metavar="YAML",
        help="of --prompts: the model once more, by this plan on other devices, for a share of the prompts; repeatable",
    )
    _add_sampling(sub)
    add_compute(sub)
    add_plan(sub)
    add_kv_cache(sub, of_plan=True)
    add_json(sub)

    sub = commands.add(
        "chat", "Talk with a model, by its chat template.", "qjax chat model.gguf --system 'Be brief.'", _chat
    )
    sub.add_argument("--system", help="the system message")
    _add_sampling(sub)
    add_compute(sub)
    add_plan(sub)
    add_kv_cache(sub, of_plan=True)

    sub = commands.add(
        "tokenize", "Token ids of a text.", "qjax tokenize embedded --file README.md --json", _tokenize, compiles=False
    )
    sub.add_argument("-p", "--prompt", help="the text")
    sub.add_argument("--file", help="a UTF-8 file ('-': standard input)")
    sub.add_argument("--bos", action="store_true", help="put BOS first, if the vocabulary has one")
    sub.add_argument("--special", action="store_true", help="read the text of control tokens as these tokens")
    add_json(sub)


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-n", "--max-tokens", type=positive, help="default: 128, or what the context leaves")
    sub.add_argument("--temperature", type=number, default=0.8, help="0 is greedy; default: 0.8")
    sub.add_argument("--top-k", type=natural, default=0, help="default: 0, all")
    sub.add_argument("--top-p", type=number, default=1.0, help="default: 1, all")
    sub.add_argument("--min-p", type=number, default=0.0, help="default: 0, all")
    sub.add_argument("--repetition-penalty", type=number, default=1.0, help="default: 1, none")
    sub.add_argument("--seed", type=natural, default=0)
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")


def _prompt(args: argparse.Namespace) -> str:
    from qjax.text.files import read_text

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
        "kv_cache",
    )
    return {name: getattr(args, name) for name in names}


def _generate(args: argparse.Namespace) -> None:
    from qjax.runs import texts
    from qjax.runs.console import console, emit_json

    if args.prompts is not None:
        _generate_many(args)
        return
    if args.replica or args.rows:
        raise QjaxError("--replica and --rows are for many prompts: give --prompts FILE")
    prompt = _prompt(args)
    model = texts.open_model(args.model, quantize=args.quantize, plan=args.plan)
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


def _generate_many(args: argparse.Namespace) -> None:
    from qjax.runs import texts
    from qjax.runs.console import console, emit_json
    from qjax.runs.many import generate_many

    if args.output is None or args.prompt is not None or args.file is not None or args.echo:
        raise QjaxError("--prompts FILE goes with -o FILE, and not with -p, -f or --echo")
    if args.stop:
        raise QjaxError("--stop is for a single prompt")
    options = _sampling(args)
    del options["stop"]
    model = lambda plan: partial(texts.open_model, args.model, quantize=args.quantize, plan=plan)
    replicas = [model(plan) for plan in args.replica]
    result = generate_many(
        model(args.plan), args.prompts, args.output, open_replicas=replicas, rows=args.rows, **options
    )
    if args.json:
        emit_json(result)
    else:
        speed = f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s"
        console.print(f"{args.output}: {result['texts']} texts ({result['found']} found there), {speed}", markup=False)


def _chat(args: argparse.Namespace) -> None:
    from qjax.runs import texts

    texts.chat(texts.open_model(args.model, quantize=args.quantize, plan=args.plan), args.system, **_sampling(args))


def _tokenize(args: argparse.Namespace) -> None:
    from qjax.runs.texts import tokenize

    tokenize(args.model, _prompt(args), bos=args.bos, parse_special=args.special, as_json=args.json)
