"""The command line: arguments -> runs. Exit codes: 0 done, 2 bad input or usage, 1 our fault."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from qjax import __version__
from qjax.cache import cache_root
from qjax.cli import calibrate, convert, launch, measure, plan, push, quantize, run, text
from qjax.cli.arguments import Commands, Parser
from qjax.errors import QjaxError, QjaxWarning


def parser_and_commands() -> tuple[argparse.ArgumentParser, tuple[str, ...]]:
    """The parser of all commands, and their names."""
    parser = Parser(
        prog="qjax", description="Open, make and run quantized LLMs with their weights still packed, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"qjax {__version__}")
    commands = Commands(parser)
    for module in (text, measure, plan, launch, calibrate, convert, quantize, push, run):
        module.add(commands)
    return parser, commands.names


def cache_compilations() -> None:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"qjax: warning: {_one_line(message)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser_and_commands()[0].parse_args(argv)
    with warnings.catch_warnings():
        # What one command has warned of, the next one in this process warns of again.
        warnings.simplefilter("default", QjaxWarning)
        warnings.showwarning = _show_warning
        return _exit_code(args)


def _join_processes() -> None:
    """Where this is one of several processes, it joins the others; the first one speaks for all on stdout."""
    from qjax.pipeline.distributed import COORDINATOR, join

    if not os.environ.get(COORDINATOR):
        return
    # What libraries in C++ print of their connections is no output of ours.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    joined = join()
    if joined is not None and joined[0] > 0:
        from qjax.runs.console import console

        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        console.quiet = True


def _end_if_alone(error: Exception) -> None:
    """End at once, with one line, if another process was lost: JAX would wait for it, and abort."""
    from qjax.pipeline.distributed import COORDINATOR, lost

    if os.environ.get(COORDINATOR) and (message := lost(error)):
        print(f"qjax: error: {message}", file=sys.stderr, flush=True)
        os._exit(2)


def _exit_code(args: argparse.Namespace) -> int:
    try:
        if args.command == "bench" and args.threads is not None:
            from qjax.evaluate.speed import limit_threads

            limit_threads(args.threads)
        if args.compiles:
            cache_compilations()
            _join_processes()
        args.run(args)
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
        _end_if_alone(error)
        if args.debug:
            raise
        name = type(error).__name__
        print(f"qjax: internal error: {name}: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        return 1
