"""What the commands' arguments have in common."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from qjax.errors import QjaxError


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines."""


class Parser(argparse.ArgumentParser):
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


def positive(text: str) -> int:
    return _whole(text, 1)


def natural(text: str) -> int:
    return _whole(text, 0)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def byte_count(text: str) -> int:
    """Bytes of "2GiB"."""
    from qjax.sizes import parse_size

    try:
        return parse_size(text)
    except QjaxError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


MODEL_HELP = (
    "a .gguf file, a folder with one or with a Hugging Face model, 'embedded', or a Hub id owner/name[@revision][:file]"
)
FASTEST = "of x in each product; default: int8 on a CPU with native kernels, else float"


class Commands:
    """The commands so far; each module of them adds its own."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(
        self,
        name: str,
        summary: str,
        example: str,
        run: Callable[[argparse.Namespace], None],
        *,
        model: bool = True,
        compiles: bool = True,
    ) -> argparse.ArgumentParser:
        """A command that `run` does; `model`: it takes one. `compiles`: compiled programs are worth keeping."""
        sub = self._parsers.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=_Help
        )
        sub.set_defaults(run=run, compiles=compiles)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        if model:
            sub.add_argument("model", help=MODEL_HELP)
        return sub

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parsers.choices)


def add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")


def add_compute(sub: argparse.ArgumentParser, activations: str = FASTEST) -> None:
    """How a model is run."""
    sub.add_argument("--activations", choices=("float", "int8"), help=activations)
    sub.add_argument("--quantize", metavar="TYPE", help="quantize float matrices while loading, e.g. q8_0")


def add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--plan", metavar="YAML", help="which layers live on which devices; `qjax plan -o` writes it")


def add_output(sub: argparse.ArgumentParser) -> None:
    """How the file is written."""
    sub.add_argument(
        "--split-max-size",
        type=byte_count,
        metavar="SIZE",
        help="write shards NAME-00001-of-0000N.gguf with up to this size of tensors each, such as 2GiB or 500M",
    )
    sub.add_argument("--fresh", action="store_true", help="begin anew, whatever a killed run has done already")


def named(files: Sequence[str | Path]) -> str:
    """Files that were written, in a few words."""
    more = len(files) - 1
    return f"{files[0]} and {more} more" if more else str(files[0])


def add_kv_cache(sub: argparse.ArgumentParser, *, of_plan: bool = False) -> None:
    """What keys and values are kept as; of_plan: left open, a plan may say it."""
    sub.add_argument(
        "--kv-cache",
        choices=("float", "int8"),
        default=None if of_plan else "float",
        help="int8 keeps keys and values in half the memory, with a scale for each head and token; default: float"
        + (", or what the plan says" if of_plan else ""),
    )
