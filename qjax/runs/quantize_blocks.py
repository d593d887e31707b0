"""A float model to a folder (or GGUF file) by a quantizing method, block by block: `qjax quantize --method gptq`.

Finished blocks lie in OUT.partial until all is written: a run that was killed goes on from there, to the same bytes.
What was lost of the matrices so far is told by quantization.csv there.
"""

import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from qjax import api
from qjax.arrays import QuantizedArray, Scheme, TransformedArray
from qjax.arrays.planes import layout_bits
from qjax.calibrate.checkpoints import open_checkpoints
from qjax.calibrate.data import Calibration, calibration_tokens
from qjax.calibrate.driver import model_in, quantize_blocks
from qjax.calibrate.recipes import Recipe
from qjax.errors import QjaxError, UnsupportedError
from qjax.formats.atomic import check_writable
from qjax.formats.gguf.arrays import BLOCK_TYPES
from qjax.formats.gguf.from_affine import type_for
from qjax.formats.huggingface import card
from qjax.formats.huggingface.targets import TARGETS, target_named
from qjax.formats.locate import locate
from qjax.formats.pieces import fingerprint
from qjax.formats.rules import KEEP, module_name
from qjax.formats.source import Source, open_source
from qjax.kernels import lay_out
from qjax.models.chunks import begun, chunks_of
from qjax.models.load import keep
from qjax.models.rewrite import check_quantizable
from qjax.quantizers.rtn import rtn
from qjax.runs.budget import N_CTX, Budget, measured
from qjax.runs.budget_schemes import recipe_within
from qjax.runs.console import console, emit, megabytes, progress_bar, show_table
from qjax.runs.error_log import facts, growing_log, write_log
from qjax.text.files import read_text
from qjax.version import __version__

FORMATS = (*TARGETS, "gguf")
NO_DATA = Calibration()
# Chunks of the text that a model is evaluated on.
EVALUATED = 32
_LOG = "quantization"


class Output(NamedTuple):
    """Where the model goes: a folder to be made, or of format "gguf" a file. fresh: begin anew, whatever a killed run
    has done."""

    path: Path
    format: str
    fresh: bool = False


def output_at(path: str | Path, format_name: str | None, *, fresh: bool = False) -> Output:
    """`format_name` None: GGUF for a name that ends so, else qjax's own, which holds everything.

    Raises:
      QjaxError: an unknown format; something is there already, or nothing can be written there.
    """
    path = Path(path)
    named = format_name or ("gguf" if path.suffix == ".gguf" else "qjax")
    if named not in FORMATS:
        raise QjaxError(f"expected a format of {', '.join(FORMATS)}, got {named!r}")
    if named == "gguf":
        check_writable(path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise QjaxError(f"{path}: is there already: name a folder that is not, or remove it")
    else:
        check_writable(f"{path}.partial/run.json" if Path(f"{path}.partial").is_dir() else f"{path}.partial")
    return Output(path, named, fresh)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is made of what.

    model: as `qjax.load` takes it, float. calibration: for methods that look at inputs. batch: samples that are run at
    once. evaluate: a text on which perplexity and divergence to the float model are measured; it is in memory then.
    budget: which scheme each matrix gets, but for those that a rule fits, in place of the recipe's.
    """

    model: str | Path
    recipe: Recipe
    calibration: Calibration = NO_DATA
    batch: int = 8
    evaluate: str | Path | None = None
    budget: Budget | None = None


class _Planned(NamedTuple):
    source: Source
    recipe: Recipe
    schemes: dict[str, Scheme]
    expected: float | None = None
    looked_at: Int32[np.ndarray, "chunks n_ctx"] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {} if self.expected is None else {"expected_kld": self.expected}


def _plan(job: Job, format_name: str) -> _Planned:
    """The scheme of each matrix, after a look whether the format holds them.

    Raises:
      QjaxError: see `quantize_model`.
    """
    source = open_source(locate(job.model))
    check_quantizable(source)
    if job.budget is None:
        planned = _Planned(source, job.recipe, job.recipe.schemes(source))
    else:
        holds = lambda schemes: check_storable(source, job.recipe, schemes, format_name)
        found = recipe_within(source, job.recipe, job.budget, job.calibration, holds)
        planned = _Planned(source, found.recipe, found.recipe.schemes(source), found.expected, found.chunks)
    if not planned.schemes:
        raise QjaxError(f"{source.path}: every matrix is kept: nothing is left to quantize")
    check_storable(source, job.recipe, planned.schemes, format_name)
    return planned


def quantize_model(job: Job, output: Output) -> dict[str, Any]:
    """Write the quantized model, whole or not at all, and beside it (in the folder) what was lost of each matrix.

    Returns:
      For `--json`: path, format, bytes, bits_per_weight, tensors (name, scheme, errors), seconds, peak_memory (bytes),
      resumed (blocks), and what was measured.

    Raises:
      QjaxError: the source is quantized already, the format does not hold what the recipe makes, or see
        `quantize_blocks`, `calibration_tokens`, `recipe_within` and `qjax.save`.
    """
    start = time.monotonic()
    source, recipe, schemes, *_ = planned = _plan(job, output.format)
    model = model_in(source)
    tokens = None
    if recipe.method.needs_inputs:
        tokens = calibration_tokens(
            job.calibration, partial(api.read_tokenizer, source.metadata, source.path), model.config
        )
    with open_checkpoints(f"{output.path}.partial", _stamp(planned, tokens, job.batch), fresh=output.fresh) as kept:
        done = kept.count(model.config.layers)
        if done:
            console.print(f"resuming: {done} of {model.config.layers} blocks are done", markup=False)
        with progress_bar("quantizing blocks") as advance, growing_log(kept.log) as log:
            # As kernels want them where the model is run afterwards.
            made = quantize_blocks(
                model,
                recipe.method,
                schemes,
                tokens,
                batch=job.batch,
                checkpoints=kept,
                lay_out=lay_out if job.evaluate is not None or planned.looked_at is not None else keep,
                progress=advance,
                log=log,
            )
        packed = api.Model(made.params, model.config, source.metadata, source.metadata_types, source.path)
        measures = _measures(job, planned, packed)
        told = card.Provenance(
            str(job.model),
            repr(recipe.method),
            list(map(str, job.recipe.rules)),
            _words(job.calibration, tokens),
            measures,
        )
        with progress_bar(f"writing {output.path}") as advance:
            _save(packed, output, told, lambda name: advance(note=name))
        logs = write_log(made.lines, _log_stem(output), f"{source.path.name}: {type(recipe.method).__name__}")
        kept.remove()
    memory = packed.memory
    return {
        "path": str(output.path),
        "format": output.format,
        "method": repr(recipe.method),
        "bytes": memory.nbytes,
        "bits_per_weight": memory.bits_per_weight,
        "parameters": memory.parameters,
        "tensors": facts(made.lines),
        "log": [str(path) for path in logs],
        "samples": 0 if tokens is None else len(tokens),
        "seq_len": 0 if tokens is None else tokens.shape[1],
        "resumed": made.resumed,
        **planned.facts,
        **measures,
        "seconds": time.monotonic() - start,
        "peak_memory": peak_memory(),
    }


def _save(model: api.Model, output: Output, told: card.Provenance, progress: Callable[[str], None]) -> None:
    try:
        api.save(model, output.path, output.format, provenance=told, progress=progress)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; all blocks are kept: the same with another --format writes them") from error


def _measures(job: Job, planned: _Planned, packed: api.Model) -> dict[str, float]:
    """Of the model on the text to evaluate on, and on what it was looked at."""
    found: dict[str, float] = {}
    if planned.looked_at is not None:
        cost = measured(job.model, lambda: packed, planned.looked_at)
        found |= {"measured_kld": cost.mean_kld, "measured_kld_stderr": cost.kld_stderr}
    if job.evaluate is not None:
        bos, n_ctx = packed.tokenizer.first_id, min(N_CTX, packed.config.context)
        ids = packed.encode(read_text(job.evaluate))
        cut = begun(chunks_of(packed.config, ids, n_ctx=n_ctx, bos_id=bos, chunks=EVALUATED), bos)
        cost = measured(job.model, lambda: packed, cut)
        found |= {
            "perplexity": cost.perplexity.perplexity,
            "perplexity of the float model": cost.base_perplexity,
            "mean_kld": cost.mean_kld,
            "kld_stderr": cost.kld_stderr,
        }
    return found


def plan_model(job: Job, format_name: str) -> dict[str, Any]:
    """What `quantize_model` would make; reads no weight, unless there is a budget.

    Raises:
      QjaxError: as `quantize_model` before it makes a block.
    """
    planned = _plan(job, format_name)
    weights = nbytes = 0
    tensors = []
    for name, info in planned.source.tensors.items():
        scheme, count = planned.schemes.get(name), math.prod(info.shape)
        size = info.nbytes if scheme is None else scheme.nbytes(info.shape)
        weights, nbytes = weights + count, nbytes + size
        tensors.append({"name": name, "scheme": str(scheme or KEEP), "bytes": size})
    found = {"parameters": weights, "bytes": nbytes, "bits_per_weight": 8 * nbytes / weights, "tensors": tensors}
    return found | planned.facts


def check_storable(source: Source, recipe: Recipe, schemes: Mapping[str, Scheme], format_name: str) -> None:
    """UnsupportedError for what a format does not hold, before anything is computed: a few rows are tried."""
    alike: dict[Any, QuantizedArray] = {}
    made = {}
    for name, scheme in schemes.items():
        rows, columns = source.tensors[name].shape
        # Formats pack rows by the word, which a multiple of 64 always fills.
        shape = (rows if rows < 64 else 64 + rows % 64, columns)
        if (shape, scheme) not in alike:
            alike[shape, scheme] = _like(shape, scheme, recipe)
        made[name] = alike[shape, scheme]
    modules = {name: str(module_name(name)) for name in source.tensors}
    target = None if format_name == "gguf" else target_named(format_name)
    packed = {modules[name]: array for name, array in made.items() if target is None or target.packs(modules[name])}
    tried: set[int] = set()
    for name, array in made.items():
        if modules[name] not in packed or id(array) in tried:
            continue
        tried.add(id(array))
        try:
            _check_gguf(array, schemes[name]) if target is None else target.tensors(modules[name], array)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name} would be {schemes[name]}: {error}") from error
    if target is not None:
        kept = [modules[name] for name, i in source.tensors.items() if len(i.shape) == 2 and name not in made]
        target.config(packed, kept)


def _check_gguf(array: QuantizedArray, scheme: Scheme) -> None:
    kind = type_for(array)
    if layout_bits(BLOCK_TYPES[kind].static["layout"]) > scheme.bits:
        raise UnsupportedError(f"of GGUF's types {kind} holds it, in more bits: choose as many, or save as qjax")


def _like(shape: tuple[int, int], scheme: Scheme, recipe: Recipe) -> QuantizedArray:
    """What becomes of a matrix: its family, not its numbers."""
    array = jax.tree.map(np.asarray, rtn(jnp.ones(shape, jnp.float32), scheme))
    # Groups of columns in their own order stay so, whatever the order of the rounding.
    moved = getattr(recipe.method, "act_order", False) and not getattr(recipe.method, "static_groups", False)
    columns = np.arange(shape[1], dtype=np.int32)[::-1] if moved else None
    rounding = "int8" if scheme.activations == "int8" else None
    return array if columns is None and rounding is None else TransformedArray(array, columns, rounding=rounding)


def _words(calibration: Calibration, tokens: Int32[np.ndarray, "samples seq"] | None) -> str:
    if tokens is None:
        return ""
    data = "token ids" if isinstance(calibration.data, np.ndarray) else Path(str(calibration.data)).name
    return f"{data}, {tokens.shape[0]} samples of {tokens.shape[1]} tokens"


def _stamp(planned: _Planned, tokens: Int32[np.ndarray, "samples seq"] | None, batch: int) -> dict[str, object]:
    """All that the blocks depend on."""
    data = None if tokens is None else (hashlib.sha256(tokens.tobytes()).hexdigest(), tokens.shape)
    return {
        "model": fingerprint(planned.source.files),
        "method": repr(planned.recipe.method),
        "schemes": sorted((name, str(scheme)) for name, scheme in planned.schemes.items()),
        "data": data,
        "batch size": 0 if tokens is None else batch,
        "version of qjax": __version__,
    }


def _log_stem(output: Output) -> Path:
    if output.format == "gguf":
        return output.path.with_name(f"{output.path.stem}-{_LOG}")
    return output.path / _LOG


def peak_memory() -> int:
    """Bytes that this process had in memory at most, of files that it mapped too; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def show(result: dict[str, Any]) -> None:
    """The schemes as a table."""
    rows = [(t["name"], t["scheme"], f"{t['bytes']:,}") for t in result["tensors"]]
    show_table("", ["tensor", "scheme", "bytes"], rows)
    emit(f"{megabytes(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight\n")
