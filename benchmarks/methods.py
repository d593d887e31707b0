"""KL divergence to the float model of what each quantizing method makes of it, block by block, at each scheme.

    python benchmarks/methods.py MODEL --data calibration.txt --text heldout.txt --methods rtn,awq --schemes w4g128,w8

A method is its module's name in qjax.calibrate.methods, with options of its dataclass after colons:
"awq:clip=False:n_grid=10", "learned:steps=40:start=rtn". With a seed the calibration samples are drawn from all of the
text, else they are its first ones. All are compared with the first method by a paired bootstrap over the text's chunks.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from vs_llamacpp_report import table

import qjax
from qjax.arrays import Scheme
from qjax.arrays.scheme import parse_scheme
from qjax.calibrate.blocks import Line, Method
from qjax.calibrate.driver import model_of, quantize_blocks
from qjax.evaluate.compare import Candidate, Comparison, compare
from qjax.kernels.layout import lay_out
from qjax.models.chunks import begun, chunks_of
from qjax.models.load import MATRICES, layer_tensor
from qjax.text.files import read_text

HEAD = ["scheme", "method", "KLD", "less the first's (95 %)", "perplexity", "same top", "bits a weight", "seconds"]


def method_of(text: str) -> Method:
    """The method that "name:option=value:..." names: its module is qjax.calibrate.methods.name."""
    name, *options = text.split(":")
    module = importlib.import_module(f"qjax.calibrate.methods.{name}")
    kinds = [kind for key, kind in vars(module).items() if key.lower() == name and dataclasses.is_dataclass(kind)]
    if len(kinds) != 1:
        raise SystemExit(f"qjax.calibrate.methods.{name} has no method of that name")
    found = {key: _value(value) for key, value in (option.split("=", 1) for option in options)}
    if "start" in found:
        found["start"] = method_of(found["start"])
    return kinds[0](**found)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def calibration(model: qjax.Model, text: str, samples: int, length: int, seed: int | None) -> np.ndarray:
    """int32 [samples, length] token ids, each sample with BOS in front where the model adds one."""
    bos = model.tokenizer.first_id
    cut = chunks_of(model.config, model.encode(text), n_ctx=length, bos_id=bos, chunks=None)
    if seed is not None:
        cut = np.random.default_rng(seed).permutation(cut)
    return begun(cut[:samples], bos)


def quantized(model: qjax.Model, method: Method, scheme: Scheme, tokens: np.ndarray) -> tuple[qjax.Model, list[Line]]:
    """The model with all matrices of its layers quantized, and what was lost of each."""
    names = [layer_tensor(i, name) for i in range(model.config.layers) for name in MATRICES]
    floats = model_of(model.params, model.config)
    made = quantize_blocks(floats, method, dict.fromkeys(names, scheme), tokens, lay_out=lay_out)
    return dataclasses.replace(model, params=made.params), made.lines


def measured(
    model: qjax.Model, methods: list[str], scheme: Scheme, tokens: np.ndarray, text: str, chunks: int | None
) -> tuple[Comparison, dict[str, float], dict[str, list[Line]]]:
    """What `compare` finds, and the seconds and lines of each method."""
    seconds, lines = {}, {}

    def make(name: str) -> qjax.Model:
        start = time.perf_counter()
        made, lines[name] = quantized(model, method_of(name), scheme, tokens)
        seconds[name] = time.perf_counter() - start
        return made

    models = [Candidate(name, functools.partial(make, name)) for name in methods]
    against = methods[0] if len(methods) > 1 else None
    found = compare(models, text, base=Candidate("float", lambda: model), chunks=chunks, against=against)
    return found, seconds, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="of float weights")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="what the models are compared on")
    parser.add_argument("--methods", default="rtn,awq", help="separated by commas")
    parser.add_argument("--schemes", default="w4g128,w4g128-asym,w3g128", help="separated by commas")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, help="draw the samples; default: the first ones")
    parser.add_argument("--chunks", type=int, default=32, help="of 512 tokens of the text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = qjax.load(args.model)
    tokens = calibration(model, read_text(args.data), args.samples, args.seq_len, args.seed)
    rows, results = [], []
    for scheme in args.schemes.split(","):
        methods = args.methods.split(",")
        found, seconds, lines = measured(
            model, methods, parse_scheme(scheme), tokens, read_text(args.text), args.chunks
        )
        pairs = {pair.a: pair for pair in found.pairs}
        of = {row.name: row for row in found.rows}
        for name in methods:
            row, pair = of[name], pairs.get(name)
            results.append(
                {
                    "scheme": scheme,
                    "method": name,
                    "mean_kld": row.found.mean_kld,
                    "perplexity": row.found.perplexity.perplexity,
                    "base_perplexity": row.found.base_perplexity,
                    "same_top": row.found.same_top,
                    "bits_per_weight": row.bits_per_weight,
                    "seconds": seconds[name],
                    "difference": None if pair is None else pair._asdict(),
                    "lines": [line._asdict() for line in lines[name]],
                }
            )
            rows.append(
                [
                    scheme,
                    name,
                    f"{row.found.mean_kld:.6f}",
                    "" if pair is None else f"{pair.difference:+.6f} ({pair.low:+.6f} to {pair.high:+.6f})",
                    f"{row.found.perplexity.perplexity:.4f}",
                    f"{row.found.same_top:.2%}",
                    f"{row.bits_per_weight:.2f}",
                    f"{seconds[name]:.1f}",
                ]
            )
            print(table(HEAD, rows[-1:]), flush=True)
    print(table(HEAD, rows))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
