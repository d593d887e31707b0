"""The template environment: what transformers adds, and what hostile templates cannot do."""

import re

import pytest
from jinja2 import TemplateError

from qjax.text import chat_sandbox
from qjax.text.chat_sandbox import run_template

GROW = "{% set ns = namespace(x='aa') %}{% for i in range(100) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
TREE = "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    *(LOOPS, TREE),
    "{% macro m(n) %}{{ m(n+1) }}{% endmacro %}{{ m(0) }}",
    *("{{ 9**(9**9) }}", "{{ 'x' * 10000000000 }}", "{{ [1] * 10000000000 }}"),
    *("{{ 'x'|center(10000000000) }}", "{{ 'x'.ljust(10000000000) }}", "{{ 'x'|indent(99999999999, true) }}"),
    *("{{ '%9999999999d' % 1 }}", "{{ '{:9999999999}'.format(1) }}", "{{ '%9999999999d'|format(1) }}"),
    "{{ '{:{}}'.format(1, 9999999999) }}",
    *(GROW.replace("BODY", body) for body in ("ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)")),
    *(GROW.replace("BODY", body) for body in ("ns.x|replace('a', 'aaa')", "ns.x.replace('a', 'aaa')")),
    *(GROW.replace("BODY", body) for body in ("[ns.x, ns.x]|join", "ns.x.join([ns.x, ns.x])")),
    *(GROW.replace("BODY", body) for body in ("'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)")),
    *(GROW.replace("BODY", body) for body in ("[ns.x, ns.x]|tojson", "ns.x ~ ns.x|upper")),
    "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{{ range(10**9)|list }}",
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"),
    "{{ messages.append(1) }}",
    "{{ messages|tojson(indent=99999999) }}",
    "{{ " + "(" * 10_000,
    "x" * 600_000,
]


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:60])
def test_hostile_templates_end_in_an_error(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "_MAX_SECONDS", 0.5)
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises((TemplateError, RecursionError, TypeError, OverflowError)):
        run_template(template, {"messages": messages})
    assert messages == [{"role": "user", "content": "x"}]


def test_what_transformers_adds() -> None:
    def run(template: str) -> str:
        return run_template(template, {"tool": {"b": "<é>", "a": [1, None]}, "xs": [1, 2, 3]})

    assert run("{{ tool|tojson }}") == '{"b": "<é>", "a": [1, null]}'
    assert run("{{ tool|tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  1,\n  null\n ],\n "b": "<é>"\n}'
    assert run("{% for x in xs %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"
    assert run("a{% generation %}b{{ xs[0] }}{% endgeneration %}c") == "ab1c"
    assert re.fullmatch(r"\d{4}", run("{{ strftime_now('%Y') }}"))
    assert run("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    with pytest.raises(TemplateError, match=r"^no$"):
        run("{{ raise_exception('no') }}")


def test_bounds_leave_ordinary_work_alone() -> None:
    long = "word " * 200_000
    messages = [{"role": "user", "content": long}, *[{"role": "user", "content": "a\n\tb"}] * 1000]
    template = "{% for m in messages %}{{ m.content|replace('x', 'yy')|trim ~ '\n' + '-' * 3 }}{% endfor %}"
    text = run_template(template, {"messages": messages})
    assert text == "".join(message["content"].strip() + "\n---" for message in messages)
    joined = run_template("{{ messages|map(attribute='role')|join(', ') }}", {"messages": messages[:3]})
    assert joined == "user, user, user"
