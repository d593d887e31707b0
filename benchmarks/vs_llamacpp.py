"""qjax against llama.cpp: the same GGUF files, the same number of threads, turns taken within one run.

Weights are made up (`qjax bench --save`). In each round every type has, for each test, one sample of qjax and one of
llama.cpp next to each other in time, and who goes first alternates: a noisy machine is noisy to both. The ratio is
the median of the ratios within rounds; the ratio of the two medians stands beside it.

llama.cpp is its own `llama-bench` (--llama-bench), a process a sample, with its own warm-up; or, where only
llama-cpp-python is at hand (--peer-python), `llama_decode` called as llama-bench calls it, without Python's sampling
loop. Both run with flash attention off and on, and the better one counts; all else is llama.cpp's default.
Loading counts for neither. The read bandwidth of the machine is measured in the same rounds with as many threads.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vs_llamacpp_report import INT4, INT4_PEER, TARGETS, TESTS, int4_rows, plot, report, rows_of

SIDES = ("qjax", "llama.cpp")
BANDWIDTH_BYTES = 2 << 30
# What of /proc/cpuinfo's flags decides the speed of a dot of small integers.
FLAGS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "asimddp": "NEON dotprod",
    "i8mm": "NEON i8mm",
}

# ---- workers: processes that load once and answer each line of stdin with one line of JSON


def serve(facts: dict[str, Any], answer: Callable[..., Any], answers: Any) -> None:
    """Say what was loaded, then answer requests (words of a line) until stdin ends."""
    answers.write(json.dumps(facts) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(answer(*line.split())) + "\n")
        answers.flush()


def int4_params(config: Any) -> dict[str, Any]:
    """Made-up params with each matrix, the output's too, in 4 bits under groups of 128; float16 embeddings.

    Codes and zero points are random, scales such that weights are near trained ones' size, 1/sqrt(in).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.arrays import AffineArray
    from qjax.kernels import lay_out
    from qjax.models.load import MATRICES, NORMS, expected_shapes, inverse_frequencies

    rng = np.random.default_rng(0)

    def matrix(name: str) -> Any:
        out, columns = shapes[name]
        scale = rng.uniform(0.5, 1.5, (out, columns // 128)) * columns**-0.5 / 5
        zero = rng.integers(7, 10, scale.shape, np.uint8)
        codes = jax.device_put(rng.integers(0, 256, (out, columns // 2), np.uint8))
        return lay_out(name, AffineArray((codes,), jnp.asarray(scale, jnp.float16), None, zero=jnp.asarray(zero)))

    shapes = expected_shapes(config)
    norm = jnp.ones(config.hidden, jnp.float32)
    return {
        "token_embd": jnp.asarray(rng.standard_normal(shapes["token_embd.weight"], np.float32), jnp.float16),
        "output": matrix("output.weight"),
        "output_norm": norm,
        "rope": jax.device_put(inverse_frequencies(config, None)),
        "layers": [
            {
                **{name: matrix(f"blk.{i}.{name}.weight") for name in MATRICES},
                **dict.fromkeys(NORMS, norm),
            }
            for i in range(config.layers)
        ],
    }


def qjax_worker(source: str, threads: int, answers: Any) -> None:
    """Answers "tg 128" or "tg 128 int8" with tokens a second; `source` is a file, or int4:SHAPE."""
    from qjax.evaluate.speed import limit_threads, measure

    limit_threads(threads)
    import jax

    import qjax
    from qjax.arrays import memory
    from qjax.evaluate.shapes import shape_of
    from qjax.kernels import default_activations
    from qjax.pipeline import one_stage

    if source.startswith("int4:"):
        config = shape_of(source.removeprefix("int4:")).config
        params = int4_params(config)
    else:
        model = qjax.load(source)
        params, config = model.params, model.config
    jax.block_until_ready(params)

    def sample(test: str, tokens: str, activations: str | None = None) -> float:
        executor = one_stage(params, config, activations or default_activations())
        sizes = {"pp": 0, "tg": 0} | {test: int(tokens)}
        return measure(executor, **sizes, repeat=1)[0].tokens_per_second

    # A token reads one row of the embedding and all of the rest.
    rest = {key: value for key, value in params.items() if key != "token_embd"}
    default = default_activations()
    serve({"touched": memory(rest).nbytes, "activations": default, "jax": jax.__version__}, sample, answers)


def peer_worker(source: str, threads: int, answers: Any) -> None:
    """Answers "tg 128" with {flash attention: tokens a second}; runs in the peer's Python.

    As llama-bench does it: random tokens, an empty cache of just the size, batches of 2048 in pieces of 512, no
    sampling, one synchronization a step; before the clock starts the whole prompt, or one token.
    """
    import ctypes
    import random

    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(source.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot open {source}")
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def run(context: Any, tokens: int, batch: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        for start in range(0, tokens, batch):
            count = min(batch, tokens - start)
            ids = (lib.llama_token * count)(*(random.randrange(vocab) for _ in range(count)))
            if lib.llama_decode(context, lib.llama_batch_get_one(ids, count)):
                raise SystemExit("llama_decode failed")
            if batch == 1:
                lib.llama_synchronize(context)
        lib.llama_synchronize(context)

    def sample(test: str, count: str) -> dict[str, float]:
        tokens, rates = int(count), {}
        for flash in (0, 1):
            wanted = lib.llama_context_default_params()
            wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = tokens, 2048, 512
            wanted.n_threads = wanted.n_threads_batch = threads
            wanted.flash_attn_type = flash
            context = lib.llama_init_from_model(model, wanted)
            batch = 1 if test == "tg" else 2048
            run(context, 1 if test == "tg" else tokens, batch)
            start = time.perf_counter()
            run(context, tokens, batch)
            rates[str(flash)] = tokens / (time.perf_counter() - start)
            lib.llama_free(context)
        return rates

    facts = {"build": f"llama-cpp-python {lib.__version__}", "system": lib.llama_print_system_info().decode()}
    serve(facts, sample, answers)


def bandwidth_worker(source: str, threads: int, answers: Any) -> None:
    """Answers any line with {method: bytes a second} of reading a buffer far larger than the caches.

    The best of three passes of each: what is sought is what the memory can do.
    """
    # The threads are ours; before numpy is imported.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from qjax.evaluate.speed import limit_threads

    limit_threads(threads)
    import jax
    import numpy as np
    from decode import bandwidth

    def sample() -> dict[str, float]:
        # Held for the moment only: large models need the room.
        block = jax.device_put(np.ones((BANDWIDTH_BYTES >> 15, 1 << 13), np.float32))
        parts = np.array_split(np.asarray(block).reshape(-1), threads)

        def numpy_pass() -> float:
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            return block.nbytes / (time.perf_counter() - start)

        with ThreadPoolExecutor(threads) as pool:
            return {
                "numpy": max(numpy_pass() for _ in range(3)),
                "jax": max(bandwidth(block) for _ in range(3)),
            }

    serve({}, lambda *words: sample(), answers)


WORKERS = {"qjax": qjax_worker, "peer": peer_worker, "bandwidth": bandwidth_worker}


class Worker:
    """A process of this script that answers each line with one line of JSON.

    Attributes:
      facts: what it said when it was ready.
    """

    def __init__(self, kind: str, source: str, threads: int, python: str = sys.executable) -> None:
        self.name = f"{kind} {source}"
        self.process = subprocess.Popen(
            [python, __file__, "--worker", kind, source, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts: dict[str, Any] = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker for {self.name} ended: its message is above")
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- the peer


def parse_llama_bench(text: str) -> tuple[str, dict[str, float]]:
    """(build, {flash attention: tokens a second}) of `llama-bench -o json` with one test.

    Raises:
      ValueError: several tests, or none.
    """
    results = json.loads(text)
    if len({(result["n_prompt"], result["n_gen"]) for result in results}) != 1:
        raise ValueError(f"expected one test of llama-bench, got {len(results)} results")
    build = f"{results[0]['build_commit']} (build {results[0]['build_number']})"
    # Older builds write true and false.
    return build, {str(int(result["flash_attn"])): statistics.median(result["samples_ts"]) for result in results}


def system_info(llama_bench: str) -> str:
    """The instruction sets that llama-bench was built for, asked of the library beside it; empty if there is none."""
    library = Path(llama_bench).resolve().parent / "libllama.so"
    ask = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).llama_print_system_info; f.restype = ctypes.c_char_p; "
    command = [sys.executable, "-c", ask + "print(f().decode())", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class Peer:
    """llama.cpp, by llama-bench or by llama-cpp-python.

    Attributes:
      build: its version, once a sample was taken.
      system: what its build uses of the processor, if it can be asked.
    """

    def __init__(self, llama_bench: str | None, python: str | None, threads: int) -> None:
        self.llama_bench, self.python, self.threads = llama_bench, python, threads
        self.build, self.system = "", system_info(llama_bench) if llama_bench else ""
        self.workers: dict[Path, Worker] = {}

    def sample(self, path: Path, test: str, tokens: int) -> dict[str, float]:
        if self.llama_bench is None:
            assert self.python is not None
            if path not in self.workers:
                self.workers[path] = Worker("peer", str(path), self.threads, self.python)
                self.build, self.system = (self.workers[path].facts[key] for key in ("build", "system"))
            return self.workers[path].ask(test, tokens)
        sizes = {"pp": 0, "tg": 0} | {test: tokens}
        words = ["-p", sizes["pp"], "-n", sizes["tg"], "-r", 1, "-fa", "0,1", "-t", self.threads, "-o", "json"]
        done = subprocess.run(
            [self.llama_bench, "-m", str(path), *map(str, words)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"llama-bench failed on {path}:\n{done.stderr}")
        self.build, rates = parse_llama_bench(done.stdout)
        return rates

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


# ---- the run


class Turn(NamedTuple):
    """One pair of samples: who goes first, then the other."""

    round: int
    type: str
    test: str
    order: tuple[str, ...]


def schedule(rounds: int, types: list[str]) -> Iterator[Turn]:
    """All pairs in their order: from a round to the next, and from a pair to the next, the other side goes first."""
    for i in range(rounds):
        for j, name in enumerate(types):
            for k, test in enumerate(TESTS):
                swap = (i + j * len(TESTS) + k) % 2
                yield Turn(i, name, test, SIDES[::-1] if swap else SIDES)


def model_file(folder: Path, shape: str, name: str) -> Path:
    """A GGUF file of made-up weights; written unless it is there."""
    path = folder / f"{shape}-{name}.gguf"
    if not path.exists():
        command = ["bench", "--shape", shape, "--type", name, "--save", str(path)]
        subprocess.run([sys.executable, "-m", "qjax.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return path


def batches(sizes: dict[str, int], free: int) -> list[list[str]]:
    """Types that are in memory together: all, or one after another where that is too much.

    Each is held by qjax, and by the peer as a file and once more in its own order.
    """
    return [list(sizes)] if 3 * sum(sizes.values()) + BANDWIDTH_BYTES < free else [[name] for name in sizes]


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All samples: {"samples": {type: {test: {"qjax": [...], "llama.cpp": [{flash: ...}, ...]}}}, ...}."""
    counts = {"tg": args.tg, "pp": args.pp}
    files = {name: model_file(folder, args.shape, name) for name in args.types}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peer = Peer(args.llama_bench, args.peer_python, args.threads)
    memory = Worker("bandwidth", "-", args.threads)
    facts: dict[str, dict[str, Any]] = {}
    samples: dict[str, Any] = {}
    read: list[dict[str, float]] = []

    def note(turn: Turn, side: str, value: Any) -> None:
        print(f"round {turn.round + 1} {turn.type} {turn.test} {side} {value}", file=sys.stderr, flush=True)
        samples.setdefault(turn.type, {}).setdefault(turn.test, {}).setdefault(side, []).append(value)

    for types in batches(sizes, free):
        workers = {name: Worker("qjax", str(files[name]), args.threads) for name in types}
        if INT4_PEER in types:
            workers[INT4] = Worker("qjax", f"int4:{args.shape}", args.threads)
        facts.update({name: worker.facts for name, worker in workers.items()})
        # Left out, the worker measures with the default that ships.
        chosen = [] if args.activations is None else [args.activations]
        seen = -1
        for turn in schedule(args.rounds, types):
            if turn.round != seen:
                seen = turn.round
                read.append(memory.ask("read"))
            for side in turn.order:
                if side == "qjax":
                    note(turn, side, workers[turn.type].ask(turn.test, counts[turn.test], *chosen))
                else:
                    note(turn, side, peer.sample(files[turn.type], turn.test, counts[turn.test]))
            if turn.type == INT4_PEER:
                value = workers[INT4].ask(turn.test, counts[turn.test], *chosen)
                note(turn._replace(type=INT4), "qjax", value)
        for worker in workers.values():
            worker.close()
        peer.close()
    memory.close()
    first = next(iter(facts.values()))
    return {
        "command": sys.argv,
        "machine": machine(Path("/proc/cpuinfo")),
        "versions": {
            "qjax": importlib.metadata.version("qjax") + commit(),
            "jax": first["jax"],
            "llama.cpp": peer.build,
            "llama.cpp system": peer.system,
        },
        "shape": args.shape,
        "threads": args.threads,
        "tokens": counts,
        "activations": args.activations or first["activations"],
        "touched": {name: fact["touched"] for name, fact in facts.items()},
        "bandwidth_samples": read,
        "bandwidth": statistics.median(max(one.values()) for one in read),
        "samples": samples,
    }


def machine(cpuinfo: Path) -> str:
    """The processor's name and what it has for dots, as Linux tells."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    names = [name for flag, name in FLAGS.items() if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(names)})"


def commit() -> str:
    """The checkout's commit in brackets, with a + if files have changed since; nothing outside a checkout."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
    )
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has llama-cpp-python")
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--types", nargs="+", default=list(TARGETS["tg"]))
    parser.add_argument("--tg", type=int, default=128)
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activations", choices=["float", "int8"], help="qjax's own default if left out")
    parser.add_argument("--folder", type=Path, help="where the files are kept; else they are made and removed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.llama_bench is None and args.peer_python is None:
        parser.error("give llama.cpp by --llama-bench or --peer-python")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(args, folder)
    print(report(result))
    if args.json:
        result |= {"rows": rows_of(result), "int4_rows": int4_rows(result)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        # Whatever a library prints goes to stderr; the pipe is for answers alone.
        pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        WORKERS[sys.argv[2]](sys.argv[3], int(sys.argv[4]), pipe)
    else:
        main()
