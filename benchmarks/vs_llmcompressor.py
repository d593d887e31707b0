"""Quantizing methods against llm-compressor's and AutoRound's: KL divergence to the float model on held-out text.

    QJAX_PEERS=/path/to/a/python/with/llmcompressor python benchmarks/vs_llmcompressor.py MODEL \\
        --data calibration.txt --text heldout.txt

For each seed, samples are drawn from the calibration text, and both sides are given the same token ids. What the peers
make is decoded to float weights by a decoder of its own (tests/interop/peers/decode.py) and run by qjax, as what qjax
makes is run packed; where activations are rounded (w8a8), qjax opens the peers' folder itself. The differences of each
chunk, a mean over the seeds, are resampled (paired bootstrap).
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from vs_llamacpp_report import table

import qjax
from qjax.arrays import parse_scheme
from qjax.calibrate.data import Calibration, calibration_tokens
from qjax.calibrate.recipes import recipe
from qjax.evaluate.bootstrap import Bootstrap, paired_bootstrap
from qjax.evaluate.compare import Candidate, compare
from qjax.text.files import read_text

PEERS = Path(__file__).parents[1] / "tests" / "interop" / "peers"
OURS = "qjax"


@dataclasses.dataclass(frozen=True)
class Made:
    """What one side makes: its method, with options after colons ("learned:steps=40"), at a scheme."""

    side: str
    method: str
    scheme: str

    def __str__(self) -> str:
        return f"{self.side} {self.method} {self.scheme}"

    @property
    def seeded(self) -> bool:
        """Whether it depends on the samples."""
        return self.method != "rtn"


class Match(NamedTuple):
    """What should be no further from the float model than another."""

    a: Made
    b: Made

    @property
    def name(self) -> str:
        return f"{self.a} | {self.b}"


class Result(NamedTuple):
    """a, b: mean divergences, nats, by seed. found: of a less b."""

    match: Match
    a: list[float]
    b: list[float]
    found: Bootstrap

    @property
    def verdict(self) -> str:
        low, high = float(self.found.low[0]), float(self.found.high[0])
        if high < 0:
            return "less"
        if low > 0:
            return "MORE"
        return "no more" if self.found.mean[0] <= 0 else "more, within the interval"


def matches(steps: Iterable[int]) -> list[Match]:
    """All that are compared."""
    mine = lambda method, scheme: Made(OURS, method, scheme)
    peer = lambda method, scheme: Made("llm-compressor", method, scheme)
    low = ("w3g128", "w2g32-asym")
    found = [Match(mine("gptq", s), peer("gptq", s)) for s in ("w4g128", "w4g128-asym", "w3g128", "w8", "w2g32-asym")]
    found += [Match(mine("gptq", s), mine("rtn", s)) for s in ("w4g128", "w4g128-asym", *low)]
    for s in ("w4g128", "w4g128-asym", "w3g128"):
        found += [Match(mine("awq", s), peer("awq", s)), Match(mine("awq", s), mine("rtn", s))]
    for n in steps:
        learned = f"learned:steps={n}"
        found += [Match(mine(learned, s), Made("AutoRound", f"steps={n}", s)) for s in ("w4g128", *low)]
        found += [Match(mine(learned, s), mine("gptq", s)) for s in low]
    found.append(Match(mine("smoothquant", "w8a8"), peer("smoothquant", "w8a8")))
    return found


def peer_command(made: Made, model: Path, out: Path, samples: Path) -> list[str]:
    """What is run by the peers' python; AutoRound makes a folder within `out`."""
    scheme = parse_scheme(made.scheme)
    options = ["--samples", str(samples), "--bits", str(scheme.bits), "--group", str(scheme.group_size)]
    options += [] if scheme.symmetric else ["--asymmetric"]
    if made.side == "AutoRound":
        return [str(PEERS / "autoround.py"), str(model), str(out), *options, "--steps", made.method.split("=")[1]]
    method, *more = made.method.split(":")
    options += ["--activations", scheme.activations, "--method", "gptq" if method == "gptq" else "rtn"]
    options += [] if method in ("gptq", "rtn") else ["--before", method]
    return [str(PEERS / "llm_compressor.py"), str(model), str(out), *options, *(f"--{option}" for option in more)]


class Bench:
    """One float model, its texts, and a folder with what the peers made of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.folder, self.python = args.model, args.folder, args.peers
        self.text, self.chunks = read_text(args.text), args.chunks
        self.base = qjax.load(args.model)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokens = {seed: self._drawn(args, seed) for seed in args.seeds}

    def _drawn(self, args: argparse.Namespace, seed: int) -> np.ndarray:
        if self._samples(seed).exists():
            return np.load(self._samples(seed))
        wanted = Calibration(args.data, args.samples, args.seq_len, seed)
        tokens = calibration_tokens(wanted, lambda: self.base.tokenizer, self.base.config)
        np.save(self._samples(seed), tokens)
        return tokens

    def _samples(self, seed: int) -> Path:
        return self.folder / f"samples-{seed}.npy"

    def open(self, made: Made, seed: int) -> qjax.Model:
        if made.side != OURS:
            return qjax.load(self._peers(made, seed))
        method, *options = made.method.split(":")
        given = {key: json.loads(value) for key, value in (option.split("=") for option in options)}
        return qjax.load(
            self.model,
            quantize=recipe(method, parse_scheme(made.scheme), options=given),
            calibration=Calibration(self.tokens[seed], len(self.tokens[seed])),
        )

    def _peers(self, made: Made, seed: int) -> Path:
        """The folder that qjax is to open; made if it is not there."""
        out = self.folder / f"{str(made).replace(' ', '-').replace(':', '-')}-{seed}"
        start = time.perf_counter()
        if not out.exists():
            # Under another name until it is whole.
            with tempfile.TemporaryDirectory(dir=self.folder) as made_in:
                self._run(*peer_command(made, self.model, Path(made_in) / "out", self._samples(seed)))
                # AutoRound names a folder itself.
                next(Path(made_in).rglob("config.json")).parent.rename(out)
            print(f"{made}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if parse_scheme(made.scheme).activations != "float":
            return out
        decoded = self.folder / "decoded"
        if not (decoded / out.name).exists():
            self._run(str(PEERS / "decode.py"), str(decoded), str(out))
        return decoded / out.name

    def _run(self, *command: str) -> None:
        # More threads than idle cores only wait for each other.
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
        done = subprocess.run([self.python, *command], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")

    def measure(self, wanted: Iterable[Made]) -> dict[Made, np.ndarray]:
        """Mean divergence of each chunk, nats [seeds, chunks]."""
        names = {f"{made}, {seed}": (made, seed) for made in wanted for seed in self._seeds(made)}
        candidates = [Candidate(name, functools.partial(self.open, *which)) for name, which in names.items()]
        base = Candidate("float", lambda: self.base)
        report: Callable[..., Any] = lambda name, done, total, so_far: (
            print(f"{name}: {so_far:.6f}", file=sys.stderr, flush=True) if done == total else None
        )
        rows = compare(candidates, self.text, base=base, chunks=self.chunks, progress=report).rows
        of = {row.name: row.chunk_kld for row in rows}
        seeds = len(self.tokens)
        found = {made: [of[f"{made}, {seed}"] for seed in self._seeds(made)] for made, _ in names.values()}
        return {made: np.stack(klds if made.seeded else klds * seeds) for made, klds in found.items()}

    def _seeds(self, made: Made) -> list[int]:
        return list(self.tokens) if made.seeded else list(self.tokens)[:1]


def result(match: Match, klds: dict[Made, np.ndarray]) -> Result:
    a, b = klds[match.a], klds[match.b]
    found = paired_bootstrap((a - b).mean(axis=0)[None])
    return Result(match, a.mean(axis=1).tolist(), b.mean(axis=1).tolist(), found)


def report(results: list[Result]) -> str:
    """A markdown table; divergences in thousandths of a nat."""
    milli = lambda values: " ".join(f"{1000 * value:.3f}" for value in values)
    rows = [
        [
            r.match.a.scheme,
            f"{r.match.a.side} {r.match.a.method}",
            f"{r.match.b.side} {r.match.b.method}",
            f"{1000 * np.mean(r.a):.3f} ({milli(r.a)})",
            f"{1000 * np.mean(r.b):.3f} ({milli(r.b)})",
            f"{np.mean(r.a) / np.mean(r.b):.3f}",
            f"{1000 * r.found.mean[0]:+.3f} ({milli(r.found.low)} to {milli(r.found.high)})",
            r.verdict,
        ]
        for r in results
    ]
    head = ["scheme", "a", "b", "KLD of a, mean (seeds)", "of b", "a / b", "a - b (95 %)", "a has"]
    return table(head, rows)


def as_json(r: Result) -> dict[str, Any]:
    numbers = {key: float(value[0]) for key, value in r.found._asdict().items()}
    sides = {"a": str(r.match.a), "b": str(r.match.b), "kld_a": r.a, "kld_b": r.b}
    return {**sides, "difference": numbers, "verdict": r.verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder of float weights")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="what divergence is measured on")
    parser.add_argument("--peers", default=os.environ.get("QJAX_PEERS"), help="python with the peers; QJAX_PEERS")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="matches whose names have one of these")
    parser.add_argument("--steps", type=int, nargs="+", default=[40], help="of learned rounding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--chunks", type=int, help="of 512 tokens of the text; default: all")
    parser.add_argument("--folder", type=Path, help="samples and what the peers made are kept here, and not made again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not args.peers:
        parser.error("--peers, or the variable QJAX_PEERS, has to name a python that has llm-compressor and auto-round")
    wanted = [match for match in matches(args.steps) if any(text in match.name for text in args.only)]
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        klds = Bench(args).measure(dict.fromkeys(made for match in wanted for made in match[:2]))
    results = [result(match, klds) for match in wanted]
    print(report(results))
    if args.json:
        args.json.write_text(json.dumps([as_json(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
