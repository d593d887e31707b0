"""qjax's own safetensors files: any packed array, leaf by leaf, with a description of the rest in the header.

An array NAME of family F has a tensor NAME/LEAF for each leaf, and under "qjax" in the header's `__metadata__` stands
{NAME: {"family": F, FIELD: ...}} as JSON, a field's value being the name of its tensor, a list of such names, null, the
description of an array in it, or for static fields a JSON value. Plain arrays are tensors as they are. Nothing read
from a file is run: families are looked up among those that there are, and leaves that do not fit are refused.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.arrays import Plane, QuantizedArray, TransformedArray
from qjax.errors import FormatError
from qjax.formats.affine_parts import plain_numpy
from qjax.formats.atomic import atomic_file
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface.checkpoint import Checkpoint, as_numpy, read_header
from qjax.formats.huggingface.json_files import parse_object
from qjax.formats.huggingface.parts import Found, Packed
from qjax.formats.huggingface.safetensors_file import NUMPY, TensorSpec, data_of, header, spec_of
from qjax.formats.mapped import map_file

KEY, VERSION_KEY, VERSION = "qjax", "qjax_version", "1"
_HEX = "hex"


class Described(NamedTuple):
    """An array as it is stored: `description` (None for a plain one) and `leaves`, by the names of their tensors."""

    description: dict[str, Any] | None
    leaves: dict[str, Any]


def describe(name: str, array: Any) -> Described:
    """An array, or one of shapes alone, as a file has it; laid out for kernels or cut over devices it becomes plain."""
    leaves: dict[str, Any] = {}
    if not isinstance(array, QuantizedArray):
        return Described(None, {name: array})
    return Described(_described(array, name, leaves), leaves)


def metadata(descriptions: Mapping[str, dict[str, Any] | None], facts: Mapping[str, str]) -> dict[str, str]:
    """What the header of a file with these arrays says beside the tensors."""
    packed = {name: entry for name, entry in descriptions.items() if entry is not None}
    return {"format": "pt", VERSION_KEY: VERSION, KEY: json.dumps(packed, separators=(",", ":")), **facts}


def write_arrays(path: str | Path, arrays: Mapping[str, Any], facts: Mapping[str, str] | None = None) -> None:
    """Write named arrays, packed or plain, to one file, whole or not at all.

    Args:
      facts: what else the header shall say, for `read_facts`.

    Raises:
      QjaxError: see `atomic_file`.
      UnsupportedError: a dtype that safetensors files do not have.
    """
    described = {name: describe(name, plain_numpy(array)) for name, array in arrays.items()}
    leaves = {leaf: data for entry in described.values() for leaf, data in entry.leaves.items()}
    # Large numbers first, so that all lie at multiples of their size.
    specs = sorted((spec_of(leaf, data) for leaf, data in leaves.items()), key=lambda s: -s.dtype.itemsize)
    head = header(specs, metadata({name: entry.description for name, entry in described.items()}, facts or {}))
    with atomic_file(path) as file:
        file.write(head)
        for spec in specs:
            file.write(data_of(leaves[spec.name]))


def read_facts(path: str | Path) -> dict[str, str]:
    """What `write_arrays` was given as facts (and what else the header says).

    Raises:
      FormatError: there is no such file, or it is damaged.
    """
    path = Path(path)
    data = map_file(path, "a .safetensors file")
    read_header(data, path)
    found = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")], f"{path}: its header")
    facts = found.get("__metadata__", {})
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise FormatError(f"{path}: its header's __metadata__ is {shown(str(facts))}, expected texts")
    return facts


def read_arrays(path: str | Path) -> dict[str, Any]:
    """All arrays of a file, by name; numpy leaves, views of the file.

    Raises:
      FormatError: there is no such file, or it is damaged, or describes what its tensors are not.
    """
    path = Path(path)
    data = map_file(path, "a .safetensors file")
    tensors = read_header(data, path)
    checkpoint = Checkpoint(tensors, {path: data})
    found = descriptions([path])
    leaves = leaf_names(found.values())
    plain = [name for name in tensors if name not in leaves]
    arrays = {name: read_native(checkpoint, name, entry) for name, entry in found.items()}
    return {**{name: _leaf(checkpoint, name, name) for name in plain}, **arrays}


def leaf_names(descriptions: Iterable[Any]) -> frozenset[str]:
    """The names of tensors that are leaves of described arrays."""
    return frozenset(leaf for description in descriptions for leaf in _leaf_names(description))


def descriptions(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What the headers of files say of the packed arrays in them, by name.

    Raises:
      FormatError: a header is damaged, or made by a later version.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        facts = read_facts(path)
        if KEY not in facts:
            continue
        if facts.get(VERSION_KEY) != VERSION:
            raise FormatError(f"{path}: made by another version of qjax ({shown(str(facts.get(VERSION_KEY)))})")
        entries = parse_object(facts[KEY], f"{path}: the description of its arrays")
        for name, entry in entries.items():
            if not isinstance(entry, dict):
                raise FormatError(f"{path}: {shown(name)} is described by {shown(str(entry))}, expected an object")
            found[name] = entry
    return found


def read_native(checkpoint: Checkpoint, name: str, description: Mapping[str, Any]) -> QuantizedArray:
    """The packed array NAME; numpy leaves, views of the files.

    Raises:
      FormatError: a description that fits no family, or leaves that do not fit each other.
    """
    try:
        array = _built(description, name, functools.partial(_leaf, checkpoint, name), depth=2)
        leaves, tree = jax.tree.flatten(array)
        shape = _dequantized_shape(tree, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))
        fits = shape == array.shape and len(shape) >= 1 and _in_some_order(array)
    except FormatError:
        raise
    # Whatever a family's own code raises for what is not its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{name}: its description and its tensors do not fit: {reason}") from error
    if not fits:
        raise FormatError(f"{name}: its tensors stand for {shape}, expected columns taken once each of {array.shape}")
    return array


def find(checkpoint: Checkpoint, name: str, description: Mapping[str, Any], path: Path) -> Packed:
    """The packed array NAME ("model.layers.0.mlp.up_proj.weight") of a folder, seen as other formats' matrices are.

    Raises:
      FormatError: see `read_native`; names the file.
    """
    try:
        array = read_native(checkpoint, name, description)
    except FormatError as error:
        raise FormatError(f"{path}: {error}: download the model or make it again") from error
    if len(array.shape) != 2:
        raise FormatError(f"{path}: {shown(name)} has the shape {array.shape}, expected a matrix")
    bits, group = getattr(array, "bits", round(array.bits_per_weight)), getattr(array, "group_size", -1)
    how = "as the file's header describes it"
    found = Found(name.removesuffix(".weight"), KEY, bits, group, array.describe(), how)
    parts = {leaf: checkpoint.tensors[leaf] for leaf in _leaf_names(description) if leaf in checkpoint.tensors}
    out, columns = array.shape
    return Packed(found, (out, columns), parts, lambda _: array)


def specs_of(described: Described) -> list[TensorSpec]:
    """The tensors of an array, in the order in which they are written."""
    return sorted((spec_of(name, leaf) for name, leaf in described.leaves.items()), key=lambda s: -s.dtype.itemsize)


def _families() -> dict[str, type[Any]]:
    """Every family of packed arrays, but those that are laid out for one machine's kernels."""
    found: dict[str, type[Any]] = {}
    classes: list[type[Any]] = [QuantizedArray]
    while classes:
        family = classes.pop()
        classes += family.__subclasses__()
        if dataclasses.is_dataclass(family) and family.__name__ != "LaneBlockedArray":
            found[family.__name__] = family
    return found


def _described(array: Any, name: str, leaves: dict[str, Any]) -> dict[str, Any]:
    def entry(value: Any, leaf: str) -> Any:
        if value is None:
            return None
        if isinstance(value, QuantizedArray):
            return _described(value, leaf, leaves)
        if isinstance(value, tuple):
            return [entry(part, f"{leaf}.{i}") for i, part in enumerate(value)]
        leaves[leaf] = value
        return leaf

    found: dict[str, Any] = {"family": type(array).__name__}
    for field in dataclasses.fields(array):
        value = getattr(array, field.name)
        static = not field.metadata.get("pytree_node", True)
        found[field.name] = _static(value) if static else entry(value, f"{name}/{field.name}")
    return found


def _static(value: Any) -> Any:
    """A static field as JSON."""
    return {_HEX: value.hex()} if isinstance(value, bytes) else value


def _from_static(field: str, value: Any) -> Any:
    """A static field from JSON: lists are tuples."""
    match value:
        case {"hex": str(text)}:
            return bytes.fromhex(text)
        case list():
            parts = tuple(_from_static(field, part) for part in value)
            return Plane(*parts) if field == "layout" and len(parts) == 2 and isinstance(parts[0], int) else parts
        case str() | int() | float() | None:
            return value
    raise ValueError(f"{field} is {value!r:.40}")


def _built(description: Mapping[str, Any], name: str, leaf: Callable[[str], np.ndarray], depth: int) -> Any:
    family = _families().get(str(description.get("family")))
    if family is None or depth == 0:
        raise FormatError(f"{name}: its family is {shown(str(description.get('family')))}, which is not known here")

    def value(field: str, entry: Any) -> Any:
        match entry:
            case None:
                return None
            case str():
                return leaf(entry)
            case list():
                return tuple(value(field, part) for part in entry)
            case dict():
                return _built(entry, name, leaf, depth - 1)
        raise FormatError(f"{name}: {field} is {shown(str(entry))}, expected names of tensors")

    fields = dataclasses.fields(family)
    if description.keys() != {"family", *(field.name for field in fields)}:
        raise FormatError(f"{name}: described by {', '.join(description)}, expected the fields of {family.__name__}")
    values: dict[str, Any] = {}
    for field in fields:
        entry = description[field.name]
        if field.metadata.get("pytree_node", True):
            values[field.name] = value(field.name, entry)
        else:
            values[field.name] = _from_static(field.name, entry)
    return family(**values)


def _leaf_names(description: Any) -> Iterable[str]:
    """The tensors that a description may name: all texts in it."""
    if isinstance(description, str):
        yield description
    elif isinstance(description, dict | list):
        for part in description.values() if isinstance(description, dict) else description:
            yield from _leaf_names(part)


def _leaf(checkpoint: Checkpoint, name: str, leaf: str) -> np.ndarray:
    tensor = checkpoint.tensors.get(leaf)
    if tensor is None:
        raise FormatError(f"{name}: its tensor {shown(leaf)} is missing")
    return as_numpy(tensor, checkpoint.raw(leaf)).view(NUMPY[tensor.dtype])


def _in_some_order(array: Any) -> bool:
    """Whether columns that are taken in another order are each taken once."""
    if not isinstance(array, TransformedArray) or array.columns is None:
        return True
    return np.array_equal(np.sort(array.columns), np.arange(array.shape[-1]))


@functools.lru_cache(maxsize=1024)
def _dequantized_shape(tree: Any, leaves: tuple[tuple[tuple[int, ...], str], ...]) -> tuple[int, ...]:
    shapes = [jax.ShapeDtypeStruct(shape, np.dtype(kind)) for shape, kind in leaves]
    return jax.eval_shape(lambda array: array.dequantize(), jax.tree.unflatten(tree, shapes)).shape
