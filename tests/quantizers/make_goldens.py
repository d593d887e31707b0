"""ggml_blocks.npz: what ggml's own encoders make of the floats of `samples`, by its library through ctypes.

python tests/quantizers/make_goldens.py path/to/libggml-base.so
"""

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

GOLDENS = Path(__file__).with_name("ggml_blocks.npz")
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS")


def samples() -> tuple[np.ndarray, np.ndarray]:
    """float32 rows [24, 512] of several kinds, and an importance of each column."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((8, 512))
    heavy = rng.standard_t(3, (8, 512))
    kinds = rng.uniform(-1, 1, (8, 512))
    kinds[0] = 0
    kinds[1, :256] = 0.25
    kinds[2] = np.abs(kinds[2])
    kinds[3] *= np.exp(rng.normal(0, 3, 512))
    kinds[4, ::7] = 30
    w = np.concatenate([normal, heavy, kinds]).astype(np.float32) * np.float32(0.02)
    importance = rng.chisquare(1, 512).astype(np.float32) + np.float32(1e-3)
    return w, importance


def ggml(library: ctypes.CDLL, kind: str, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    number = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[number]
    out = np.zeros((w.shape[0], w.shape[1] // size * nbytes), np.uint8)
    p, n = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = (ctypes.c_int, p, p, n, n, n, p)
    weights = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(int(number), w.ctypes.data, out.ctypes.data, 0, w.shape[0], w.shape[1], weights)
    return out


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    w, importance = samples()
    made = {kind: ggml(library, kind, w, None) for kind in TYPES}
    made |= {f"{kind} weighted": ggml(library, kind, w, importance) for kind in TYPES}
    np.savez_compressed(GOLDENS, **made)


if __name__ == "__main__":
    main()
