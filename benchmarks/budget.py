"""Types chosen under a budget against llama.cpp's mixes of the same bytes, with the same importance matrix.

For each mix a file is made, then one of at most its size by `qjax quantize --target-size`, whose types are chosen on
the calibration text alone. Both are compared with the float model on other texts, with a paired bootstrap over chunks:

    python benchmarks/budget.py f16.gguf --data calibration.txt --imatrix imatrix.gguf --texts heldout.txt wiki.txt
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from vs_llamacpp_report import table

import qjax
from qjax.evaluate.compare import Candidate, Pair, Row, compare
from qjax.formats.gguf.plan import Wish
from qjax.runs.budget import Budget, quantize_within
from qjax.runs.quantize import quantize_file
from qjax.text.files import read_text

MIXES = ("q2_k", "q3_k_m", "q4_k_m")
HEAD = ["mix", "text", "bytes", "budget's", "KLD", "budget's", "ratio", "difference (95 %)", "expected", "measured"]


def made(
    source: str, folder: Path, mix: str, data: str | None, imatrix: str | None
) -> tuple[list[Path], dict[str, Any]]:
    """The mix and the budget's file, and what is said of the latter."""
    plain, best = folder / f"{mix}.gguf", folder / f"{mix}-budget.gguf"
    quantize_file(source, plain, Wish(mix), imatrix=imatrix)
    budget = Budget(nbytes=plain.stat().st_size, data=data)
    return [plain, best], quantize_within(source, best, Wish(mix), budget, imatrix=imatrix)


def compared(source: str, files: list[Path], text: str, chunks: int | None) -> tuple[Pair, Row, Row]:
    """How they differ, and what was measured of each."""
    models = [Candidate(f.stem, functools.partial(qjax.load, f), f.stat().st_size) for f in files]
    base = Candidate("float", functools.partial(qjax.load, source))
    found = compare(models, read_text(text), base=base, chunks=chunks, against=files[0].stem)
    mixed, best = (next(row for row in found.rows if row.name == model.name) for model in models)
    return found.pairs[0], mixed, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--data", help="calibration text; default: what the model writes")
    parser.add_argument("--imatrix", help="for both files; default: none for the mix, Fisher information for the other")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("--chunks", type=int, help="of each text; default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for mix in args.mixes:
            files, said = made(args.source, Path(folder), mix, args.data, args.imatrix)
            for text in args.texts:
                pair, mixed, best = compared(args.source, files, text, args.chunks)
                klds = [row.found.mean_kld for row in (mixed, best)]
                results.append(
                    {
                        "mix": mix,
                        "text": Path(text).name,
                        "bytes": [row.nbytes for row in (mixed, best)],
                        "mean_kld": klds,
                        "perplexity": [row.found.perplexity.perplexity for row in (mixed, best)],
                        "difference": pair._asdict(),
                        "expected_kld": said["expected_kld"],
                        "measured_kld": said.get("measured_kld"),
                    }
                )
                rows.append(
                    [
                        mix,
                        Path(text).name,
                        f"{mixed.nbytes:,}",
                        f"{best.nbytes:,}",
                        f"{klds[0]:.5f}",
                        f"{klds[1]:.5f}",
                        f"{klds[1] / klds[0]:.3f}",
                        f"{pair.difference:+.5f} ({pair.low:+.5f} to {pair.high:+.5f})",
                        f"{said['expected_kld']:.5f}",
                        f"{said.get('measured_kld', float('nan')):.5f}",
                    ]
                )
                print(table(HEAD, rows[-1:]), flush=True)
    print(table(HEAD, rows))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
