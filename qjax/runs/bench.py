"""Speed and memory of a model, as llama-bench shows them."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qjax import api
from qjax.evaluate.shapes import shape_of
from qjax.evaluate.speed import measure, peak_bytes
from qjax.evaluate.synthetic import save_synthetic, synthetic_params
from qjax.formats.source import open_source
from qjax.kernels import default_activations, describe, native, select
from qjax.models.load import gguf_tensors
from qjax.models.slots import slots_for
from qjax.pipeline import Plan
from qjax.pipeline.report import report
from qjax.pipeline.sizes import model_sizes
from qjax.runs.console import emit, megabytes, progress_bar, show_table
from qjax.runs.texts import open_model

# Rows of x that stand for a prompt.
MANY = 512


def _open(
    model: str | None, shape: str | None, type_name: str, quantize: str | None, plan: str | None = None
) -> tuple[str, api.Model]:
    if model is not None:
        opened = open_model(model, quantize=quantize, plan=plan)
        return str(opened.config.arch), opened
    assert shape is not None
    config = shape_of(shape).config
    with progress_bar(f"making {shape} {type_name}") as advance:
        params = synthetic_params(config, type_name, progress=lambda _: advance())
    return f"{shape} {type_name}", api.Model(params, config, {}, {}, Path(shape))


def bench(
    model: str | None,
    *,
    shape: str | None = None,
    type_name: str = "q4_0",
    quantize: str | None = None,
    pp: int = 512,
    tg: int = 128,
    repeat: int = 5,
    threads: int | None = None,
    activations: Any = None,
    kv_cache: Any = None,
    plan: str | None = None,
) -> dict[str, Any]:
    """Prompt and generation speed of a file, or of made-up weights of a known shape.

    Args:
      plan: which layers live on which devices; what it predicts for these steps of decoding stands beside the speed.
    """
    activations = activations or default_activations()
    start = time.perf_counter()
    name, opened = _open(model, shape, type_name, quantize, plan)
    kv_cache = opened.cache_kind(kv_cache)
    jax.block_until_ready(opened.params)
    load_seconds = time.perf_counter() - start
    with progress_bar("measuring") as advance:
        rows = measure(
            opened.executor(activations),
            pp=pp,
            tg=tg,
            repeat=repeat,
            cache_dtype=jnp.int8 if kv_cache == "int8" else jnp.float16,
            progress=lambda test, done, total: advance(done, total, test),
        )
    size = opened.memory
    predicted = None if opened.placing is None or not tg else _predicted(opened, opened.placing.plan, tg, kv_cache)
    return {
        "model": name,
        "bytes": size.nbytes,
        "parameters": size.parameters,
        "bits_per_weight": size.bits_per_weight,
        "backend": jax.default_backend(),
        "threads": threads,
        "activations": activations,
        "kv_cache": kv_cache,
        "rows": [row._asdict() for row in rows],
        "predicted": predicted,
        "load_seconds": load_seconds,
        "peak_bytes": peak_bytes(),
    }


def _predicted(model: api.Model, plan: Plan, tokens: int, kv_cache: Any) -> float:
    """Tokens a second of one text that a plan expects, while its cache has room for so many tokens and no more."""
    alone = dataclasses.replace(plan, batch=1, microbatches=1, context=slots_for(1, tokens), cache=kv_cache)
    return report(alone, model_sizes(open_source(model.source), plan.type)).tokens_per_second


def kernels(
    model: str | None,
    *,
    shape: str | None = None,
    type_name: str = "q4_0",
    quantize: str | None = None,
    activations: Any,
) -> dict[str, Any]:
    """Which kernel each matrix takes for one row of x and for many, without running any."""
    activations = activations or default_activations()
    name, opened = _open(model, shape, type_name, quantize)
    rows = []
    tied = "output" not in opened.params
    for tensor, array in gguf_tensors(opened.params, opened.config):
        if array.ndim != 2 or (tensor == "token_embd.weight" and not tied):
            continue
        names = [select(array, count, activations).name for count in (1, MANY)]
        rows.append({"tensor": tensor, "weight": describe(array), "decode": names[0], "prefill": names[1]})
    return {"model": name, "activations": activations, "instructions": native.isa(), "rows": rows}


def show_kernels(result: dict[str, Any]) -> None:
    """A line a tensor; layers that are all alike are one line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in result["rows"]:
        suffix = re.sub(r"^blk\.\d+\.", "blk.*.", row["tensor"])
        alike.setdefault((suffix, row["weight"], row["decode"], row["prefill"]), []).append(row["tensor"])
    lines = [(f"{len(names)} x {key[0]}" if len(names) > 1 else names[0], *key[1:]) for key, names in alike.items()]
    title = f"{result['model']}, {result['activations']} activations, native: {result['instructions'] or 'no'}"
    show_table(title, ["tensor", "weight", "1 row", f"{MANY} rows"], lines)


def save(shape: str, type_name: str, path: str) -> None:
    """Write made-up weights as GGUF, so that another program can be measured on the same file."""
    with progress_bar(f"writing {path}") as advance:
        save_synthetic(path, shape_of(shape), type_name, progress=lambda _: advance())


def show(result: dict[str, Any]) -> None:
    """The result as llama-bench's table."""
    lead = (
        result["model"],
        megabytes(result["bytes"]),
        f"{result['parameters'] / 1e6:.2f} M",
        f"{result['backend']}, {result['activations']} x",
    )
    rows = [(*lead, row["test"], f"{row['tokens_per_second']:.2f} ± {row['std']:.2f}") for row in result["rows"]]
    show_table("", ["model", "size", "params", "backend", "test", "t/s"], rows)
    if result["predicted"] is not None:
        emit(f"decode: {result['predicted']:.2f} tokens/s predicted by the plan\n")
    facts = f"loaded in {result['load_seconds']:.1f} s, peak memory {megabytes(result['peak_bytes'])}"
    show_table("", ["memory"], [(facts,)])
