"""A checkpoint gives back what was saved, bit for bit, and says so when it cannot."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import FormatError
from qjax.runs.checkpoint import load_meta, load_tree, save_checkpoint

TREE = (
    {"a.b": jnp.asarray([0.1, -0.0], jnp.float32)},
    [jnp.asarray(3, jnp.int32), (jnp.ones((2, 2), bool),)],
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.npz"
    save_checkpoint(path, TREE, {"step": 3, "text": "ä"})
    assert load_meta(path) == {"step": 3, "text": "ä"}
    found = load_tree(path, TREE)
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(TREE), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.npz"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(path, TREE, {})
    with pytest.raises(FormatError, match=r"expected \(\(3,\)"):
        load_tree(path, ({"a.b": jnp.zeros(3, jnp.float32)}, TREE[1]))
    with pytest.raises(FormatError, match="not a checkpoint of this run"):
        load_tree(path, {"other": jnp.zeros(3, jnp.float32)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="not a checkpoint of this run"):
        load_meta(path)
