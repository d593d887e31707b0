"""The cache: room for what was asked, and more of it when it grows."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluate.shapes import llama
from qjax.models import KVCache, init_cache
from qjax.models.cache import grow_cache

CONFIG = llama(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=64)


def test_growing_keeps_what_is_held() -> None:
    empty = init_cache(CONFIG, 3, 5, jnp.bfloat16)
    full = KVCache(
        tuple(keys + 1 for keys in empty.keys), tuple(values + 2 for values in empty.values), empty.length + 5
    )
    grown = grow_cache(full, 8)
    assert (grown.slots, grown.batch, grown.length.tolist()) == (8, 3, [5, 5, 5])
    assert grown.nbytes * 5 == full.nbytes * 8
    for before, after in zip((*full.keys, *full.values), (*grown.keys, *grown.values), strict=True):
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(np.asarray(after[:, :, :5], np.float32), np.asarray(before, np.float32))
        assert not np.asarray(after[:, :, 5:], np.float32).any()
    assert full.slots == 5


def test_an_int8_cache_grows_with_its_scales() -> None:
    empty = init_cache(CONFIG, 3, 5, jnp.int8)
    full = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), empty)
    grown = grow_cache(full, 8)
    assert (grown.slots, grown.batch, grown.length.tolist()) == (8, 3, [1, 1, 1])
    assert grown.nbytes * 5 == full.nbytes * 8
    floats = init_cache(CONFIG, 3, 5, jnp.float16)
    assert empty.nbytes * 2 * CONFIG.head_dim == floats.nbytes * (CONFIG.head_dim + 4)
    for before, after in zip(jax.tree.leaves(full.keys), jax.tree.leaves(grown.keys), strict=True):
        np.testing.assert_array_equal(after[:, :, :5], before)
        assert not np.asarray(after[:, :, 5:]).any()
