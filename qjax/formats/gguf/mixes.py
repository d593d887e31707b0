"""Mixes: tables that say which tensor of a model gets which type, read from mixes.yaml or a file of the user's.

The schema stands at the top of mixes.yaml.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qjax.errors import QjaxError
from qjax.formats.gguf.places import ROLES, Condition, Place, condition
from qjax.formats.gguf.types import type_named
from qjax.formats.yaml_file import YAML_ENDINGS, read_yaml

T = TypeVar("T")

_FILE = Path(__file__).with_name("mixes.yaml")


class Rule(NamedTuple):
    """The type of the tensors that it fits: of one of the roles (none named: of any), whose name the pattern is found
    in, where all conditions hold."""

    type: str
    roles: tuple[str, ...] = ()
    name: re.Pattern[str] | None = None
    when: tuple[Condition, ...] = ()

    def fits(self, name: str, place: Place) -> bool:
        return (
            (not self.roles or place.role in self.roles)
            and (self.name is None or self.name.search(name) is not None)
            and all(holds(place) for holds in self.when)
        )


class Mix(NamedTuple):
    """A table: `base` for what no rule fits, of the rules the first that does.

    output: the type of the output matrix, or of the embedding that serves as one, where no rule fits.
    file_type: the number as `general.file_type`.
    """

    base: str
    file_type: int
    output: str = "Q6_K"
    rules: tuple[Rule, ...] = ()


@functools.cache
def _tables() -> tuple[Mapping[str, Mix], Mapping[str, str]]:
    data = read_yaml(_FILE)
    made: dict[str, Mix] = {}
    for name, table in data["mixes"].items():
        made[name] = _mix(table, f"{_FILE}: {name}", made)
    return made, data["aliases"]


def mixes() -> Mapping[str, Mix]:
    """llama-quantize's mixes by their names in lower case."""
    return _tables()[0]


def aliases() -> Mapping[str, str]:
    """Other names of some of them, as llama-quantize takes them."""
    return _tables()[1]


def _named(name: str) -> Mix | None:
    return mixes().get(aliases().get(name.lower(), name.lower()))


def is_mix(name: str) -> bool:
    """Whether this is the name of a mix, or of a YAML file that should hold one."""
    return name.lower().endswith(YAML_ENDINGS) or _named(name) is not None


def mix_of(name: str) -> Mix:
    """The mix of this name ("q4_k_m", "Q4_K_M", "q4_k"), or of a file ("my_mix.yaml").

    Raises:
      QjaxError: there is no such mix (lists the known ones), or the file is none: names the key that is wrong.
    """
    if name.lower().endswith(YAML_ENDINGS):
        return _mix(read_yaml(name), name, mixes())
    found = _named(name)
    if found is None:
        raise QjaxError(f"type {name!r} is not known, expected one of {', '.join(mixes())}, or a .yaml file with a mix")
    return found


def file_type(mix: str) -> int:
    """The number that stands as `general.file_type` in a file of this mix; QjaxError for an unknown one."""
    return mix_of(mix).file_type


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression to be found in tensors' names, in any case.

    Raises:
      QjaxError: it is none.
    """
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise QjaxError(f"expected a regular expression, got {text!r}: {error}") from None


def _check_keys(data: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        raise QjaxError(f"{where}: expected keys and values, got {data!r:.80}")
    for key in data:
        if key not in known:
            raise QjaxError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")


def _read(read: Callable[[str], T], value: Any, where: str) -> T:
    """`read` of a text, with the place named in its errors."""
    try:
        if not isinstance(value, str):
            raise QjaxError(f"expected text, got {value!r:.80}")
        return read(value)
    except QjaxError as error:
        raise QjaxError(f"{where}: {error}") from None


def _each(read: Callable[[str], T], value: Any, where: str) -> tuple[T, ...]:
    return tuple(_read(read, item, where) for item in (value if isinstance(value, list) else [value]))


def _role(text: str) -> str:
    if text not in ROLES:
        raise QjaxError(f"unknown role {text!r}; known are {', '.join(ROLES)}")
    return text


def _file_type(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise QjaxError(f"{where}: expected a number such as 15, got {value!r:.80}")
    return value


def _mix(data: Any, where: str, known: Mapping[str, Mix]) -> Mix:
    _check_keys(data, ("extends", "file_type", "base", "output", "rules"), where)

    def parent(text: str) -> Mix:
        if text.lower() not in known:
            raise QjaxError(f"unknown mix {text!r}, expected one of {', '.join(known)}")
        return known[text.lower()]

    if "extends" in data:
        mix = _read(parent, data["extends"], f"{where}: extends")
    elif "base" in data:
        base = _read(type_named, data["base"], f"{where}: base")
        mix = Mix(base, min((mix.file_type for mix in known.values() if mix.base == base), default=0))
    else:
        raise QjaxError(f"{where}: expected a key 'base' (the type of most matrices) or 'extends' (a mix)")
    rules = data.get("rules", [])
    if not isinstance(rules, list):
        raise QjaxError(f"{where}: rules: expected a list, got {rules!r:.80}")
    return Mix(
        base=_read(type_named, data.get("base", mix.base), f"{where}: base"),
        file_type=_file_type(data.get("file_type", mix.file_type), f"{where}: file_type"),
        output=_read(type_named, data.get("output", mix.output), f"{where}: output"),
        rules=(*(_rule(rule, f"{where}: rule {i}") for i, rule in enumerate(rules, 1)), *mix.rules),
    )


def _rule(data: Any, where: str) -> Rule:
    _check_keys(data, ("role", "name", "when", "type"), where)
    if "type" not in data:
        raise QjaxError(f"{where}: expected a key 'type'")
    return Rule(
        type=_read(type_named, data["type"], f"{where}: type"),
        roles=_each(_role, data.get("role", []), f"{where}: role"),
        name=_read(pattern, data["name"], f"{where}: name") if "name" in data else None,
        when=_each(condition, data.get("when", []), f"{where}: when"),
    )
