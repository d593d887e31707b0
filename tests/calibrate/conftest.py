"""The embedded model and a text that llama-imatrix was run on too."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.models.chunks import begun, chunks_of

# Test files are no package: what several of them use (`looking.py`) is found there.
sys.path.insert(0, str(Path(__file__).parent))

TEXT = Path(__file__).parents[2] / "LICENSE"
CTX, CHUNKS = 128, 6


@pytest.fixture(scope="session")
def model() -> Any:
    return qjax.load("embedded")


@pytest.fixture(scope="session")
def chunks(model: Any) -> np.ndarray:
    bos = model.tokenizer.bos_id
    ids = model.encode(TEXT.read_text(encoding="utf-8"))
    return begun(chunks_of(model.config, ids, n_ctx=CTX, bos_id=bos, chunks=CHUNKS), bos)
