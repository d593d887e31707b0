"""How a model is quantized, in one value: a method with its options, the scheme of all matrices, and rules for some.

    qjax.load(FOLDER, quantize=qjax.GPTQ(bits=4, group_size=128, rules=["ffn_down=w8"]), calibration="wikitext-2")

The functions here are public under their capital names; each takes the options of its method besides what it names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from qjax.arrays import Scheme
from qjax.arrays.scheme import CHANNEL
from qjax.calibrate.blocks import Method
from qjax.errors import QjaxError
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.rules import Rule, parse_rule, schemes_by
from qjax.formats.source import Source


class _Where(NamedTuple):
    module: str
    name: str
    # What is quantized to unless another scheme is asked for.
    scheme: Scheme = Scheme()


# Imported when asked for: optax takes a while.
METHODS: Mapping[str, _Where] = {
    "rtn": _Where("rtn", "RTN"),
    "gptq": _Where("gptq", "GPTQ"),
    "awq": _Where("awq", "AWQ", Scheme(symmetric=False)),
    "learned": _Where("learned", "Learned"),
    "smoothquant": _Where("smoothquant", "SmoothQuant", Scheme(8, CHANNEL, activations="int8")),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """method: how. scheme: of every matrix in the layers, but for those that one of the rules fits."""

    method: Method
    scheme: Scheme
    rules: tuple[Rule, ...] = ()

    def schemes(self, source: Source) -> dict[str, Scheme]:
        """The scheme of each float matrix of a model that gets one; see `schemes_by`."""
        shapes = {
            name: info.shape
            for name, info in source.tensors.items()
            if len(info.shape) == 2 and info.type in FLOAT_TYPES
        }
        return schemes_by(shapes, self.scheme, self.rules)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return " ".join([repr(self.method), str(self.scheme), *map(str, self.rules)])


def recipe(
    method: str,
    scheme: Scheme | None = None,
    rules: Sequence[str | Rule] = (),
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a method by its name in `METHODS`.

    Args:
      scheme: None for the method's usual one. rules: see `parse_rule`. options: of the method.

    Raises:
      QjaxError: no such method or option, an option's value that it does not take, or a text that is no rule.
    """
    if method not in METHODS:
        raise QjaxError(f"expected a method of {', '.join(METHODS)}, got {method!r}")
    where = METHODS[method]
    kind = getattr(import_module(f"qjax.calibrate.methods.{where.module}"), where.name)
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options or {}:
        if name not in known:
            raise QjaxError(f"{where.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
    parsed = tuple(rule if isinstance(rule, Rule) else parse_rule(rule) for rule in rules)
    return Recipe(kind(**options or {}), where.scheme if scheme is None else scheme, parsed)


def RTN(
    bits: int = 4, group_size: int = 128, *, symmetric: bool = True, rules: Sequence[str] = (), **options: Any
) -> Recipe:
    """Each weight to the nearest point of its group's grid; needs no calibration."""
    return recipe("rtn", Scheme(bits, group_size, symmetric), rules, options)


def INT8(*, rules: Sequence[str] = (), **options: Any) -> Recipe:
    """8 bits with a scale a row, to nearest; activations stay float (see `SmoothQuant` for int8 ones)."""
    return recipe("rtn", Scheme(8, CHANNEL), rules, options)


def GPTQ(
    bits: int = 4, group_size: int = 128, *, symmetric: bool = True, rules: Sequence[str] = (), **options: Any
) -> Recipe:
    """Column by column, what is lost of one made good in the next (Frantar et al. 2022)."""
    return recipe("gptq", Scheme(bits, group_size, symmetric), rules, options)


def AWQ(
    bits: int = 4, group_size: int = 128, *, symmetric: bool = False, rules: Sequence[str] = (), **options: Any
) -> Recipe:
    """Columns scaled by how large their inputs are, before they are rounded (Lin et al. 2023)."""
    return recipe("awq", Scheme(bits, group_size, symmetric), rules, options)


def Learned(
    bits: int = 4, group_size: int = 128, *, symmetric: bool = True, rules: Sequence[str] = (), **options: Any
) -> Recipe:
    """Rounding and ranges learned for each block's output (Cheng et al. 2023: signed gradients)."""
    return recipe("learned", Scheme(bits, group_size, symmetric), rules, options)


def SmoothQuant(*, rules: Sequence[str] = (), **options: Any) -> Recipe:
    """8-bit weights and activations, with outliers moved from these to those (Xiao et al. 2022)."""
    return recipe("smoothquant", METHODS["smoothquant"].scheme, rules, options)
