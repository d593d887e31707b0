"""One file holds all of an unfinished training run: a tree of arrays and what JSON can say, without pickle.

It is written atomically: a run that is killed while writing keeps the checkpoint before.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.errors import FormatError
from qjax.formats.atomic import atomic_file


def save_checkpoint(path: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Writes the leaves of `tree`, named by their path in it, and `meta` to one npz file, atomically."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays: dict[str, Any] = {f"tree{jax.tree_util.keystr(key)}": np.asarray(leaf) for key, leaf in leaves}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)


def load_meta(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return json.loads(_read(path, ["meta"])["meta"].tobytes())


def load_tree(path: Path, like: Any) -> Any:
    """The arrays of a checkpoint in the structure of `like`, whose leaves say the shapes and dtypes.

    Raises:
        FormatError: where the file is damaged, or a leaf is missing or of another shape or dtype.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [f"tree{jax.tree_util.keystr(key)}" for key, _ in leaves]
    arrays = _read(path, names)
    for name, (_, leaf) in zip(names, leaves, strict=True):
        found, expected = arrays[name], (leaf.shape, leaf.dtype)
        if (found.shape, found.dtype) != expected:
            raise FormatError(f"{path}: {name}: expected {expected}, got {(found.shape, found.dtype)}; delete it")
    return jax.tree_util.tree_unflatten(treedef, [jax.numpy.asarray(arrays[name]) for name in names])


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path}: not a checkpoint of this run ({error}); delete it to start afresh") from error
