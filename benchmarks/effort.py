"""What `qjax quantize --effort high` is worth: KL divergence, error and time of files by llama-quantize and by qjax.

All are made from the same float file, with the same types.

Divergences are to the float file's predictions on the text; differences to the first program's file are taken token by
token, and their standard error over chunks.
"""

import argparse
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf.quants as oracle
import numpy as np
from gguf import GGMLQuantizationType
from vs_llamacpp_report import table

from qjax.api import load
from qjax.errors import QjaxWarning
from qjax.evaluate.divergence import read_base, save_base, score_against
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.imatrix import read_imatrix
from qjax.formats.gguf.plan import Wish
from qjax.models.chunks import chunks_of
from qjax.runs.quantize import quantize_file


def divergences(path: Path, base: Path) -> np.ndarray:
    """[chunks, tokens]"""
    model = load(path)
    predictions = read_base(base, model.config)
    options = {"bos_id": model.tokenizer.first_id, "chunks": None, "activations": "float", "progress": None}
    return score_against(model.params, model.config, predictions, **options).kld


def weighted_error(source: Path, path: Path, imatrix: Path | None) -> float:
    """Sum of importance * squared difference over what is quantized, relative to a tensor's mean importance."""
    importances = {} if imatrix is None else read_imatrix(imatrix).of
    floats, made, error = open_gguf(source), open_gguf(path), 0.0
    for name, info in made.tensors.items():
        if info.type in ("F32", "F16", "BF16"):
            continue
        w = np.asarray(floats.raw(name).view(np.float16), np.float32)
        importance = importances.get(name, np.ones(w.shape[-1], np.float32))
        difference = oracle.dequantize(made.raw(name), GGMLQuantizationType[info.type]) - w
        error += float((importance / importance.mean() * difference**2).sum(dtype=np.float64))
    return error


def makers(args: argparse.Namespace, imatrix: Path | None) -> dict[str, Callable[[Path, str], object]]:
    def ours(effort: str) -> Callable[[Path, str], object]:
        return lambda out, mix: quantize_file(args.model, out, Wish(mix), imatrix=imatrix, effort=effort)

    def theirs(out: Path, mix: str) -> object:
        wish = [] if imatrix is None else ["--imatrix", str(imatrix)]
        command = [args.llama_quantize, *wish, str(args.model), str(out), mix]
        return subprocess.run(command, check=True, capture_output=True)

    made = {"normal": ours("normal"), "high": ours("high")}
    return made if args.llama_quantize is None else {"llama.cpp": theirs, **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a float16 GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--imatrix", type=Path, help="measure with it too")
    parser.add_argument("--types", nargs="+", default=["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs", "q4_0"])
    parser.add_argument("--llama-quantize", metavar="PATH")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="only this many; default: all")
    args = parser.parse_args()
    warnings.simplefilter("ignore", QjaxWarning)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base.kld", Path(folder) / "made.gguf"
        model = load(args.model)
        ids = model.encode(args.data.read_text())
        chunks = chunks_of(model.config, ids, n_ctx=args.ctx, bos_id=model.tokenizer.first_id, chunks=args.chunks)
        save_base(base, model.params, model.config, chunks, bos_id=model.tokenizer.first_id)
        for mix in args.types:
            for imatrix in [None] if args.imatrix is None else [None, args.imatrix]:
                first: tuple[np.ndarray, float] | None = None
                for name, make in makers(args, imatrix).items():
                    make(out, mix)  # compiles
                    start = time.perf_counter()
                    make(out, mix)
                    seconds = time.perf_counter() - start
                    kld, error = divergences(out, base), weighted_error(args.model, out, imatrix)
                    first = first or (kld, error)
                    change = (kld - first[0]).mean(axis=1) / first[0].mean()
                    spread = change.std() / max(len(change) - 1, 1) ** 0.5
                    rows.append(
                        [
                            mix + ("" if imatrix is None else " imatrix"),
                            name,
                            f"{kld.mean():.6f}",
                            f"{100 * change.mean():+.1f} ± {100 * spread:.1f} %",
                            f"{error / first[1]:.4f}",
                            f"{seconds:.2f}",
                        ]
                    )
                    print(*rows[-1], sep="  ", flush=True)
    print(table(["type", "by", "mean KLD", "change", "error", "seconds"], rows))


if __name__ == "__main__":
    main()
