"""How a model is quantized, in one value: a method with its options, the scheme of all matrices, and rules for some.

    qjax.load(FOLDER, quantize=qjax.GPTQ(bits=4, group_size=128, rules=["ffn_down=w8"]), calibration="wikitext-2")

The functions here are public under their capital names; each takes the options of its method besides what it names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.arrays import Scheme, parse_scheme
from qjax.arrays.scheme import CHANNEL
from qjax.calibrate.blocks import Method
from qjax.errors import QjaxError
from qjax.formats.gguf.arrays import FLOAT_TYPES
from qjax.formats.rules import Rule, parse_rule, schemes_by
from qjax.formats.source import Source
from qjax.quantizers.rtn import rtn


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

    def nbytes(self, source: Source) -> dict[str, int]:
        """Bytes of each of these matrices when it is packed, scales included."""
        of = lambda shape, scheme: jax.eval_shape(partial(rtn, scheme=scheme), jax.ShapeDtypeStruct(shape, jnp.float32))
        made = {name: of(source.tensors[name].shape, scheme) for name, scheme in self.schemes(source).items()}
        return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(array)) for name, array in made.items()}

    def __str__(self) -> str:
        return " ".join([repr(self.method), str(self.scheme), *map(str, self.rules)])


def recipe_for(
    method: str,
    *,
    scheme: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    rules: Sequence[str] = (),
    seed: int | None = None,
    **options: Any,
) -> Recipe:
    """A recipe of what a user said; None for what was left open.

    Args:
      scheme: as text, or else bits, group_size and symmetric in place of those of the method's usual one.
      seed: of a method that draws something; others have no use for it.

    Raises:
      QjaxError: see `recipe` and `parse_scheme`.
    """
    given = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    changed = {key: value for key, value in given.items() if value is not None}
    if scheme is not None and changed:
        raise QjaxError(f"the scheme {scheme!r} says {', '.join(changed)} already: give one of them")
    usual = _where(method).scheme if scheme is None else parse_scheme(scheme)
    wanted = {key: value for key, value in options.items() if value is not None}
    if seed is not None and "seed" in _options(method):
        wanted["seed"] = seed
    return recipe(method, dataclasses.replace(usual, **changed), rules, wanted)


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
    where, known = _where(method), _options(method)
    for name in options or {}:
        if name not in known:
            raise QjaxError(f"{where.name} has no option {name!r}; it has {', '.join(known)}")
    parsed = tuple(rule if isinstance(rule, Rule) else parse_rule(rule) for rule in rules)
    return Recipe(_class(method)(**options or {}), where.scheme if scheme is None else scheme, parsed)


def _where(method: str) -> _Where:
    if method not in METHODS:
        raise QjaxError(f"expected a method of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def _class(method: str) -> Any:
    where = _where(method)
    return getattr(import_module(f"qjax.calibrate.methods.{where.module}"), where.name)


def _options(method: str) -> list[str]:
    return [field.name for field in dataclasses.fields(_class(method))]


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
