"""What 8 and 4 bits cost: bytes, perplexity and KL divergence of one model quantized in several ways.

    python benchmarks/losses.py embedded
    python benchmarks/losses.py MODEL --data calibration.txt --text heldout.txt

The embedded model is calibrated on files that it learned from, and measured on files that it did not. Bytes are those
of the quantized matrices, scales and all, beside float16's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vs_llamacpp_report import table

import qjax
from qjax.arrays import QuantizedArray, memory
from qjax.calibrate.data import Calibration, calibration_tokens
from qjax.evaluate.compare import Candidate, compare
from qjax.models.load import MATRICES
from qjax.runs.corpus import heldout_text, read_file, training_files
from qjax.text.files import read_text

# Name: bits, and what `qjax.load` is asked for.
WAYS: dict[str, tuple[int, Callable[[], Any]]] = {
    "Q8_0 (GGUF)": (8, lambda: "q8_0"),
    "RTN, 8 bits a channel": (8, lambda: qjax.RTN(8, -1)),
    "GPTQ, 8 bits a channel": (8, lambda: qjax.GPTQ(8, -1)),
    "SmoothQuant, 8-bit weights and activations": (8, qjax.SmoothQuant),
    "Q4_K_M (GGUF)": (4, lambda: "q4_k_m"),
    "RTN, 4 bits, groups of 128": (4, lambda: qjax.RTN(4, 128)),
    "AWQ, 4 bits, groups of 128, asymmetric": (4, lambda: qjax.AWQ(4, 128)),
    "GPTQ, 4 bits, groups of 128": (4, lambda: qjax.GPTQ(4, 128)),
    "GPTQ, 4 bits, groups of 128, asymmetric": (4, lambda: qjax.GPTQ(4, 128, symmetric=False)),
}
SAMPLES, LENGTH = 128, 256
HEAD = ["", "perplexity", "loss", "KLD", "same top", "smaller than f16"]


def smaller(model: qjax.Model) -> float:
    """Bytes of 16-bit floats over those of the layers' quantized matrices."""
    found = [w for p in model.params["layers"] for name in MATRICES if isinstance(w := p[name], QuantizedArray)]
    return sum(memory(w).dequantized_nbytes for w in found) / sum(w.nbytes for w in found)


def measured(name: str, data: str | None, text: str | None, chunks: int | None) -> list[dict[str, Any]]:
    base = qjax.load(name)
    if data is None:
        learned = "\n".join(map(read_file, training_files()[::12]))
        tokens = np.asarray(base.encode(learned)[: SAMPLES * LENGTH], np.int32).reshape(SAMPLES, LENGTH)
    else:
        tokens = calibration_tokens(Calibration(data, SAMPLES, LENGTH), lambda: base.tokenizer, base.config)
    sizes = {}

    def opened(way: str) -> qjax.Model:
        how = WAYS[way][1]()
        given = {} if isinstance(how, str) else {"calibration": Calibration(tokens, len(tokens))}
        model = qjax.load(name, quantize=how, **given)
        sizes[way] = smaller(model)
        return model

    candidates = [Candidate(way, lambda way=way: opened(way)) for way in WAYS]
    scored = heldout_text() if text is None else read_text(text)
    rows = compare(candidates, scored, base=Candidate("float", lambda: base), chunks=chunks).rows
    found = []
    for row in rows:
        if row.name not in WAYS:
            continue
        ppl, of_base = row.found.perplexity.perplexity, row.found.base_perplexity
        facts = {"perplexity": ppl, "base": of_base, "loss": ppl / of_base - 1, "kld": row.found.mean_kld}
        more = {"same_top": row.found.same_top, "smaller": sizes[row.name]}
        found.append({"name": row.name, "bits": WAYS[row.name][0]} | facts | more)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="of float weights")
    parser.add_argument("--data", help="calibration text; default: files that the embedded model learned from")
    parser.add_argument("--text", help="what is measured on; default: files that the embedded model did not learn from")
    parser.add_argument("--chunks", type=int, help="of the text; default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured(args.model, args.data, args.text, args.chunks)
    print(f"{args.model}: perplexity {found[0]['base']:.4f}\n")
    rows = [
        [
            row["name"],
            f"{row['perplexity']:.4f}",
            f"{100 * row['loss']:+.2f} %",
            f"{row['kld']:.6f}",
            f"{100 * row['same_top']:.2f} %",
            f"{row['smaller']:.2f}x",
        ]
        for row in found
    ]
    print(table(HEAD, rows))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
