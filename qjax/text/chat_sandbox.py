"""Where chat templates run: jinja with what transformers adds to it, and bounds on what a template may do.

The environment is that of transformers (utils/chat_template_utils.py): immutable sandbox, trim_blocks,
lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that escapes nothing, and a
`generation` block that leaves its body as it is. But a template comes in a file from strangers, and jinja's
sandbox guards what it may touch, not what it may use up. So its time is limited, and nothing that could grow
step by step (assigned values, arguments, the prompt) or at once (products, padding, replacing) gets too big.
"""

import inspect
import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from time import monotonic
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_TEMPLATE = 500_000
_MAX_SECONDS = 10.0
_MAX_SIZE = 10_000_000
_MAX_COUNT = 1_000_000
_MAX_PARTS = 500_000
_MAX_BITS = 4096
# No name of a template's own can hold a blank.
_DEADLINE = "qjax deadline"
_WIDE = re.compile(r"\d{6}|\*")


def run_template(template: str, variables: Mapping[str, Any]) -> str:
    """What a chat template writes.

    Raises:
        jinja2.TemplateError: the template is wrong, refuses, or wants too much; and whatever else it does wrong
            in Python (TypeError, KeyError, RecursionError, ...).
    """
    _check(len(template) <= _MAX_TEMPLATE, f"is longer than {_MAX_TEMPLATE} characters")
    compiled = _compile(template)
    pieces, length = [], 0
    for piece in compiled.generate({**variables, _DEADLINE: monotonic() + _MAX_SECONDS}):
        pieces.append(piece)
        length += len(piece)
        _check(length <= _MAX_SIZE, f"writes more than {_MAX_SIZE} characters")
    return "".join(pieces)


def _check(sound: bool, complaint: str) -> None:
    if not sound:
        raise TemplateError(f"it {complaint}")


@pass_context
def _tick(context: Context, value: Any) -> Any:
    """The value itself, if there is time left: asked at each turn of a loop and each call of a macro."""
    _check(monotonic() <= context.resolve(_DEADLINE), f"runs for more than {_MAX_SECONDS:g} seconds")
    return value


def _measured(value: Any) -> Any:
    """The value itself, if writing it out would not take too much, what it holds several times counted each."""
    size, parts, rest = 0, 0, [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str | bytes):
            size += len(part)
        elif isinstance(part, int):
            size += part.bit_length() // 3
        elif isinstance(part, Mapping):
            rest.extend(part)
            rest.extend(part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            rest.extend(part)
        parts += 1
        if size > _MAX_SIZE or parts + len(rest) > _MAX_PARTS:
            raise TemplateError("it makes too big a value")
    return value


class _Bounding(NodeTransformer):
    """Has every assigned value measured, every text that `~` joins, and the time at each turn and call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._timed(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._timed(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._timed(node)

    def _timed(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._filter(nodes.Const(None), "tick")))
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = self._filter(node.node)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = self._filter(node.filter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._filter(part) for part in node.nodes]
        return node

    @staticmethod
    def _filter(node: Any, name: str = "measured") -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`, by which training finds the assistant's words."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounding().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_method("format", left, right)
        elif isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            _check(bits <= _MAX_BITS, "makes too big a number")
        elif operator == "*":
            times, many = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(many, str | bytes | list | tuple):
                _check(len(many) * times <= _MAX_SIZE, "makes too long a text")
        return super().call_binop(context, operator, left, right)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values())
        _measured(arguments)
        method = inspect.unwrap(__obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            _check_method(method.__name__, owner, *arguments)
        return super().call(__context, __obj, *args, **kwargs)


def _check_method(name: str, owner: Any, *args: Any) -> None:
    """Refuse a method or filter that would make much of little."""
    for arg in args:
        _check(not isinstance(arg, int) or abs(arg) <= _MAX_COUNT, f"asks too much of {name!r}")
    texts = [arg for arg in args if isinstance(arg, str | bytes)]
    if name in ("format", "format_map"):
        _check(not _WIDE.search(str(owner)), "formats too wide a text")
    elif name == "replace" and len(texts) > 1:
        _check(len(owner) + owner.count(texts[0]) * len(texts[1]) <= _MAX_SIZE, "replaces by too much")
    elif name in ("expandtabs", "indent", "translate"):
        widths = [arg for arg in args if isinstance(arg, int)] + [len(text) for text in texts] + [8]
        repeats = owner.count("\t") + owner.count("\n") + 1
        _check(name != "translate" and len(owner) + repeats * max(widths) <= _MAX_SIZE, f"asks too much of {name!r}")
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check(len(args[0]) * len(owner) <= _MAX_SIZE, "joins by too much")


def _guard(environment: Environment, name: str) -> None:
    """Have the first argument of a filter checked like the owner of a method of that name."""
    inner = environment.filters[name]
    context_first = hasattr(inner, "jinja_pass_arg")

    def guarded(*args: Any, **kwargs: Any) -> Any:
        owner, *rest = args[context_first:]
        if name == "join" and not isinstance(owner, str):
            owner = list(owner)
            _check_method(name, str(next(iter([*rest, *kwargs.values()]), "")), owner)
        else:
            _check_method(name, str(owner) if name != "batch" else owner, *rest, *kwargs.values())
        return inner(*args[:context_first], owner, *rest, **kwargs)

    if context_first:
        vars(guarded)["jinja_pass_arg"] = vars(inner)["jinja_pass_arg"]
    environment.filters[name] = guarded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check(indent is None or abs(indent) <= 64, "asks too wide an indent of 'tojson'")
    return json.dumps(
        _measured(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    environment = _BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, LoopControlExtension],
        finalize=_measured,
    )
    for name in ("batch", "center", "format", "indent", "join", "replace", "slice", "truncate", "wordwrap"):
        _guard(environment, name)
    environment.filters["measured"] = _measured
    environment.filters["tick"] = _tick
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]
    return environment.from_string(template)
