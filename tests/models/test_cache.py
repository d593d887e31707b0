"""The cache: room for what was asked, and more of it when it grows."""

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
