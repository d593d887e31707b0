"""`qjax quantize` against llama-quantize: the same types, nearly all blocks the same bytes, the same metadata."""

from pathlib import Path

import gguf.quants as oracle
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.plan import Wish
from qjax.formats.gguf.types import GGML_TYPES
from qjax.runs.quantize import quantize_file

pytestmark = pytest.mark.interop

PLAIN = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K_S", "q3_K_M", "q3_K_L", "q4_K_S", "q4_K_M"]
PLAIN += ["q5_K_S", "q5_K_M", "q6_K", "iq4_nl", "iq4_xs"]
IMATRIX = ["q2_K", "q3_K_M", "q4_K_M", "iq4_xs"]


@pytest.mark.parametrize(("kind", "imatrix"), [(kind, False) for kind in PLAIN] + [(kind, True) for kind in IMATRIX])
# llama-imatrix leaves the output matrix out by default.
@pytest.mark.filterwarnings("ignore:output.weight. quantized without importance")
def test_equals_llama_quantize(interop: Path, tmp_path: Path, kind: str, imatrix: bool) -> None:
    ours_path = tmp_path / "ours.gguf"
    importance = interop / "imatrix.gguf" if imatrix else None
    quantize_file(interop / "tiny-f16.gguf", ours_path, Wish(kind), imatrix=importance)
    ours, theirs = open_gguf(ours_path), open_gguf(interop / f"tiny-{'imat-' if imatrix else ''}{kind}.gguf")
    assert {n: i.type for n, i in ours.tensors.items()} == {n: i.type for n, i in theirs.tensors.items()}
    same: dict[str, list[np.ndarray]] = {}
    for name, info in theirs.tensors.items():
        nbytes = GGML_TYPES[info.type].block_bytes
        pair = (file.raw(name).reshape(-1, nbytes) for file in (ours, theirs))
        same.setdefault(info.type, []).append(np.equal(*pair).all(axis=1))
    shares = {kind: float(np.concatenate(blocks).mean()) for kind, blocks in same.items()}
    exact = {"F32", "Q8_0"} | (set() if imatrix else {"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
    assert all(share == 1 if kind in exact else share >= 0.97 for kind, share in shares.items()), shares
    for key, value in theirs.metadata.items():
        # The matrix's own path depends on where it was.
        if isinstance(value, int | float | str) and key != "quantize.imatrix.file":
            assert ours.metadata[key] == value, key


@pytest.mark.parametrize(("kind", "imatrix"), [("q4_K_S", False), ("iq4_xs", True), ("q3_K_M", True), ("q2_K", True)])
@pytest.mark.filterwarnings("ignore:output.weight. quantized without importance")
def test_high_effort_has_less_error_than_llama_quantize(
    interop: Path, tmp_path: Path, kind: str, imatrix: bool
) -> None:
    """By importance, and so for each type of a file."""
    ours_path = tmp_path / "ours.gguf"
    importance = interop / "imatrix.gguf" if imatrix else None
    source = open_gguf(interop / "tiny-f16.gguf")
    quantize_file(source.path, ours_path, Wish(kind), imatrix=importance, effort="high")
    columns = {} if importance is None else read_imatrix(importance).of
    files = open_gguf(ours_path), open_gguf(interop / f"tiny-{'imat-' if imatrix else ''}{kind}.gguf")
    errors: dict[str, np.ndarray] = {}
    for name, info in files[1].tensors.items():
        if info.type != "F32":
            w = source.raw(name).view(np.float16).astype(np.float64)
            read = [oracle.dequantize(file.raw(name), GGMLQuantizationType[info.type]) for file in files]
            weights = columns.get(name, np.ones(w.shape[-1]))
            errors[info.type] = errors.get(info.type, 0) + np.array([(weights * (r - w) ** 2).sum() for r in read])
    assert all(ours < theirs for ours, theirs in errors.values()), errors
