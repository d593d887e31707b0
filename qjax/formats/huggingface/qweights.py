"""Modules with a `qweight`: GPTQ or AWQ by the shapes of their tensors, and GPTQ's version by its zero points.

GPTQ stores zero points less one (version 1) or as they are (version 2), and labels lie about which. Weights have a mean
near 0, so the mean code is near the mean zero point: what is stored is one less than that, or is it. Where all zero
points are the middle of the codes, as symmetric quantization has them, they alone tell.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from qjax.errors import QjaxError, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface import awq, gptq
from qjax.formats.huggingface.labels import Labels, Said
from qjax.formats.huggingface.parts import FLOATS, Found, Packed, Parts
from qjax.formats.huggingface.words import pack_words, unpack_words, words_for

Layout = Literal["gptq", "gemm", "gemv"]
# Modules whose codes are looked at, and how many of their columns and rows.
_MODULES, _COLUMNS, _ROWS = 12, 512, 1024
# The mean code less the mean stored zero point is near 1 or near 0; between these it tells nothing.
_LEAST, _MOST = 0.35, 0.65


class Version(NamedTuple):
    """GPTQ's version, how that was decided, and whether the config says another."""

    number: Literal[1, 2]
    how: str
    mislabelled: bool


class Evidence(NamedTuple):
    """Of a module: bits, the stored zero point if all are the same, mean code less mean zero point, mean code."""

    bits: int
    constant: int | None
    shift: float
    mean: float

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


def layout_of(parts: Parts, said: Said) -> tuple[Layout, int]:
    """Which of the layouts the shapes are, and how many bits a code has.

    Raises:
        FormatError: none of them; UnsupportedError: another kernel's.
    """
    out, columns = parts.shape
    if "qweight" in parts and parts.stored["qweight"].dtype == "I16":
        raise UnsupportedError(
            f"{parts.where('qweight')} is I16, AWQ's gemv_fast, which is not known: take gemm or gemv"
        )
    qweight = parts.need("qweight", ("I32",))
    scales = parts.need("scales", FLOATS)
    parts.need("qzeros", ("I32",))
    if len(qweight.shape) == 2 and len(scales.shape) == 2:
        if scales.shape[1] == out:
            fitting = [bits for bits in gptq.BITS if qweight.shape == (words_for(columns, bits), out)]
            if fitting:
                return "gptq", said.bits if said.bits in fitting else fitting[0]
            if out % 8 == 0 and qweight.shape == (columns, out // 8):
                return "gemm", awq.BITS
        if scales.shape[0] == out and columns % 8 == 0 and qweight.shape == (out, columns // 8):
            return "gemv", awq.BITS
    shapes = f"qweight {qweight.shape} and scales {scales.shape}"
    raise parts.wrong("qweight", f"is no GPTQ or AWQ that is known: {shapes} for a weight {parts.shape}")


def find_awq(parts: Parts, said: Said, layout: Layout) -> Packed:
    """The module as AWQ, "gemm" or "gemv".

    Raises:
        FormatError: its tensors do not fit each other.
    """
    out, columns = parts.shape
    if layout == "gemm":
        groups = parts.stored["scales"].shape[0]
        size, why = columns // groups if groups else 0, "that of scales"
        if not groups or columns % groups:
            raise parts.wrong("scales", f"has {groups} groups, which do not divide {columns} columns")
        parts.need("qzeros", ("I32",), (groups, out // 8))
    else:
        size, why = _gemv_group(parts, said)
    found = Found(
        parts.module,
        "awq" if layout == "gemm" else "awq-gemv",
        awq.BITS,
        -1 if size == columns else size,
        f"AWQ {'' if layout == 'gemm' else 'gemv '}4-bit {'channel' if size == columns else f'g{size}'}",
        f"{layout} by the shape of qweight, groups by {why}",
    )
    facts = awq.AWQFacts("gemm" if layout == "gemm" else "gemv", size)
    return Packed(found, parts.shape, parts.choose(*awq.SUFFIXES), partial(_read_awq, parts=parts, facts=facts))


def _gemv_group(parts: Parts, said: Said) -> tuple[int, str]:
    """A group's size where scales have padding: as the config says, if the padding allows, else by its zeros."""
    columns, room = parts.shape[1], parts.stored["scales"].shape[1]
    if said.group_size == -1:
        return columns, "the config"
    if said.group_size and columns % said.group_size == 0 and columns // said.group_size <= room:
        return said.group_size, "the config"
    filled = int((parts.read("scales").astype(np.float32) != 0).any(axis=0).sum())
    if filled == 0 or columns % filled:
        raise parts.wrong("scales", f"has {filled} groups that are not padding, which do not divide {columns} columns")
    return columns // filled, "scales that are not 0"


def find_gptq(parts: Parts, said: Said, bits: int, version: Version) -> Packed:
    """The module as GPTQ.

    Raises:
        FormatError: its tensors do not fit each other.
        UnsupportedError: groups of different sizes.
    """
    out, columns = parts.shape
    groups = parts.stored["scales"].shape[0]
    parts.need("qzeros", ("I32",), (groups, words_for(out, bits)))
    if groups == 0 or columns % groups:
        raise UnsupportedError(f"{parts.where('scales')}: {columns} columns are not {groups} groups of one size")
    order, how = None, "bits by the shape of qweight, groups by that of scales"
    if "g_idx" in parts:
        parts.need("g_idx", ("I32", "I64"), (columns,))
        order = _named(parts, lambda: gptq.column_order(parts.read("g_idx"), groups))
    else:
        how += ", no g_idx: columns in order"
    zeros = _named(parts, lambda: gptq.zero_points(parts.read("qzeros"), bits, out, version.number))
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    forced = not symmetric and said.symmetric is True and _are_wrong(parts, bits)
    how += f"; zero points: {version.how}"
    if forced:
        how += f"; they are all {zeros.flat[0]}, far from the codes: taken as the middle, by sym: true"
    words = ["GPTQ", "v2" if version.number == 2 else "", f"{bits}-bit"]
    words += ["channel" if groups == 1 else f"g{columns // groups}", "" if symmetric or forced else "asym"]
    words += ["act-order" if order is not None else ""]
    found = Found(
        parts.module,
        "gptq" if version.number == 1 else "gptq_v2",
        bits,
        -1 if groups == 1 else columns // groups,
        " ".join(word for word in words if word),
        how,
    )
    facts = gptq.GPTQFacts(bits, 2 if forced else version.number)
    read = partial(_read_gptq, parts=parts, facts=facts, forced=forced)
    return Packed(found, parts.shape, parts.choose(*gptq.SUFFIXES), read)


def _read_gptq(tensors: Mapping[str, np.ndarray], *, parts: Parts, facts: gptq.GPTQFacts, forced: bool) -> Any:
    parts.finite("scales", tensors["scales"])
    if forced:
        middle = np.full((len(tensors["scales"]), parts.shape[0]), 1 << (facts.bits - 1), np.uint8)
        tensors = {**tensors, "qzeros": pack_words(middle, facts.bits)}
    return _named(parts, lambda: gptq.read(tensors, facts))


def _read_awq(tensors: Mapping[str, np.ndarray], *, parts: Parts, facts: awq.AWQFacts) -> Any:
    parts.finite("scales", tensors["scales"])
    return _named(parts, lambda: awq.read(tensors, facts))


def _named(parts: Parts, read: Any) -> Any:
    """What `read` gives; its errors begin with a suffix, and name file and module here."""
    try:
        return read()
    except QjaxError as error:
        raise type(error)(f"{parts.path}: {shown(parts.module)}: {error}") from error


def evidence_of(parts: Parts, bits: int) -> Evidence:
    """What a module's codes and zero points say; of a part of them."""
    out, columns = parts.shape
    groups = parts.stored["scales"].shape[0]
    parts.need("qzeros", ("I32",), (groups, words_for(out, bits)))
    if groups == 0:
        raise parts.wrong("scales", "has no groups")
    stored = unpack_words(parts.read("qzeros"), bits, out)
    first, rows = min(columns, _COLUMNS), min(out, _ROWS)
    # Whole words: 32 codes of any bits.
    first -= first % 32 if columns > 32 else 0
    qweight = np.ascontiguousarray(parts.read("qweight")[: words_for(first, bits), :rows].T)
    codes = unpack_words(qweight, bits, first)
    of_column = np.arange(first) * groups // columns
    if "g_idx" in parts:
        parts.need("g_idx", ("I32", "I64"), (columns,))
        of_column = np.clip(parts.read("g_idx")[:first], 0, groups - 1)
    mean, zero = float(codes.mean()), float(stored[of_column, :rows].mean())
    constant = int(stored.flat[0]) if (stored == stored.flat[0]).all() else None
    return Evidence(bits, constant, mean - zero, mean)


def _are_wrong(parts: Parts, bits: int) -> bool:
    """Whether zero points that are all the same are further from the mean code, in either version, than the middle."""
    evidence = evidence_of(parts, bits)
    if evidence.constant is None:
        return False
    nearest = min(abs(evidence.shift), abs(evidence.shift - 1))
    return abs(evidence.mean - evidence.middle) < nearest


def version_of(modules: Sequence[tuple[Parts, int]], labels: Labels) -> Version:
    """The version of all GPTQ modules (with their bits) of a folder.

    Raises:
        FormatError: a module's qzeros or g_idx do not fit.
    """
    said = str(labels.values.get("checkpoint_format") or "").lower()
    label: Literal[1, 2] = 2 if said == "gptq_v2" else 1
    step = max(len(modules) // _MODULES, 1)
    seen = [evidence_of(*module) for module in modules[::step][:_MODULES]]
    constants = {None if e.constant is None else e.constant - e.middle for e in seen}
    if constants <= {-1} or constants <= {0}:
        number: Literal[1, 2] = 1 if constants == {-1} else 2
        offset = "one less than the middle" if number == 1 else "the middle"
        how = f"version {number}, all stored ones are {offset} of the codes"
        return Version(number, how, number != label)
    # The spread of codes grows with their number.
    weights = np.array([4.0**-e.bits for e in seen])
    shift = float(np.average([e.shift for e in seen], weights=weights))
    how = f"the mean code lies {shift:.2f} above the mean stored one"
    if _MOST < shift < 2 - _MOST or -_LEAST < shift < _LEAST:
        number = 1 if shift > _MOST else 2
        return Version(number, f"version {number}, {how}", number != label)
    by = f"as checkpoint_format {shown(said)} says" if said else "as without checkpoint_format"
    return Version(label, f"version {label} {by}; {how}, which tells nothing", False)


def warn_text(labels: Labels, version: Version) -> str:
    """What to say of a folder whose label is wrong."""
    said = labels.values.get("checkpoint_format")
    label = f"checkpoint_format is {shown(str(said))}" if said else "checkpoint_format is not there, which means 'gptq'"
    return f"{labels.path}: {label}, but the zero points are of {version.how}: read as they are"
