"""Time from process start to the first token, and memory after loading, of a file the size of TinyLlama-1.1B.

Each run is a process of its own: `qjax generate FILE -p ... -n 1 --temperature 0`, once with an empty compilation
cache (cold, the C++ kernel compiled too) and then with the one that run left (warm).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import re, sys
import jax
import qjax
from qjax.cli import cache_compilations
cache_compilations()
model = qjax.load(sys.argv[1])
jax.block_until_ready(model.params)
status = open("/proc/self/status").read()
print(int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024, model.memory.nbytes)
"""


def first_token(path: Path, cache: Path) -> float:
    """Seconds of a whole process that prints one token."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "qjax.cli", "generate", str(path), "-p", "tok1 tok2", "-n", "1", "--temperature", "0"],
        env={**os.environ, "QJAX_CACHE": str(cache)},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


def anonymous_memory(path: Path, cache: Path) -> tuple[int, int]:
    """RssAnon of a process that has loaded the file, and the packed bytes it holds."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        env={**os.environ, "QJAX_CACHE": str(cache)},
        check=True,
        capture_output=True,
        text=True,
    )
    rss, packed = map(int, done.stdout.split())
    return rss, packed


def measure(types: list[str], shape: str = "tinyllama-1.1b", warm_runs: int = 3) -> list[dict]:
    rows = []
    for name in types:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder) / "model.gguf", Path(folder) / "cache"
            subprocess.run(
                [sys.executable, "-m", "qjax.cli", "bench", "--shape", shape, "--type", name, "--save", str(path)],
                check=True,
                capture_output=True,
            )
            cold = first_token(path, cache)
            warm = sorted(first_token(path, cache) for _ in range(warm_runs))[warm_runs // 2]
            rss, packed = anonymous_memory(path, cache)
        rows.append(
            {
                "type": name,
                "cold_seconds": cold,
                "warm_seconds": warm,
                "packed_bytes": packed,
                "rss_anon_bytes": rss,
                "over_packed_mb": (rss - 1.05 * packed) / 1e6,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_k_m"])
    measure(parser.parse_args().types)
