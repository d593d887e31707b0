"""What an int8 KV cache costs a real model: its divergence from the model with a float one."""

from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.evaluate.divergence import divergence, read_base, save_base
from qjax.models.chunks import chunks_of

pytestmark = pytest.mark.interop


def test_an_int8_cache_costs_less_than_any_type_of_weights(interop: Path, tmp_path: Path) -> None:
    model = qjax.load(interop / "tiny-f16.gguf")
    ids = model.encode((interop / "heldout.txt").read_text(encoding="utf-8"))
    bos = model.tokenizer.first_id
    chunks = chunks_of(model.config, ids, n_ctx=512, bos_id=bos, chunks=8)
    options = {"bos_id": bos, "progress": None}
    save_base(tmp_path / "base.kld", model.params, model.config, chunks, **options)
    base = read_base(tmp_path / "base.kld", model.config)
    found = divergence(model.params, model.config, base, kv_cache="int8", **options)
    # The nearest of all types of weights, Q8_0, is at 1.06e-4 by llama-perplexity.
    assert 0 < found.mean_kld < 5e-5
    assert abs(found.perplexity_ratio - 1) < 1e-3
    assert np.isfinite(found.max_kld)
