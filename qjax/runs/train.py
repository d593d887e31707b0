"""Trains a small Llama on a folder of text and writes it as a GGUF file, exactly resumable.

Everything follows from the config: the order of the data is a function of (seed, step), and nothing else is
random after the first weights are drawn, so a run that was cut off goes on from its checkpoint to the same
parameters, bit for bit, as one that was not.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from qjax.errors import QjaxError
from qjax.runs import corpus
from qjax.runs.checkpoint import load_meta, load_tree, save_checkpoint
from qjax.runs.config import TrainConfig, as_json, load_config
from qjax.runs.export import round_to_f16, write_model, write_record
from qjax.runs.train_data import token_stream, training_batch
from qjax.runs.train_step import Params, heldout_perplexity, init_params, make_optimizer, train_step
from qjax.runs.train_tokenizer import train_tokenizer

# Keys that change where or how often things are written, not what comes out.
FREE_TO_CHANGE = ("folder", "output", "checkpoint_minutes")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the config and the corpus give before the first step."""

    tokenizer: Tokenizer
    stream: np.ndarray
    heldout_ids: list[int]
    files: dict[str, str]
    heldout_files: dict[str, str]


def prepare(config: TrainConfig, base: Path, tokenizer_json: str | None) -> Prepared:
    """Reads the corpus and tokenizes it, by the tokenizer given as JSON or else a newly trained one."""
    folder = None if config.corpus.folder is None else base / config.corpus.folder
    held_out = config.corpus.held_out
    names = corpus.training_files(folder, held_out)
    texts = [corpus.read_file(name, folder) for name in names]
    if tokenizer_json is None:
        tokenizer = train_tokenizer(texts, config.model.vocab_size)
    else:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    stream = token_stream(tokenizer, texts)
    heldout_ids = tokenizer.encode(corpus.heldout_text(folder, held_out)).ids
    if len(stream) < 2 * config.model.context_length:
        raise QjaxError(
            f"corpus: expected at least {2 * config.model.context_length} tokens, got {len(stream)}; "
            "give more files or a smaller context_length"
        )
    if len(heldout_ids) < config.model.context_length:
        raise QjaxError(
            f"corpus.held_out: expected at least {config.model.context_length} tokens, got {len(heldout_ids)}; "
            "hold out more files"
        )
    return Prepared(
        tokenizer=tokenizer,
        stream=stream,
        heldout_ids=heldout_ids,
        files=corpus.file_hashes(names, folder),
        heldout_files=corpus.file_hashes(held_out, folder),
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """The end of a run, or where it stopped."""

    params: Params
    prepared: Prepared
    step: int
    seconds: float
    history: list[dict[str, int | float]]


def train(config: TrainConfig, base: Path, *, resume: bool = True, stop_at: int | None = None) -> Trained:
    """Trains up to step `stop_at` (None: to the end), from the checkpoint in its folder if there is one.

    Args:
        config: the run.
        base: the folder that the config's paths are relative to.
        resume: False starts afresh and overwrites the checkpoint.

    Raises:
        QjaxError: the checkpoint belongs to another config or corpus.
    """
    path = base / config.folder / "checkpoint.npz"
    meta = load_meta(path) if resume and path.exists() else None
    if meta is not None:
        _refuse_other_config(path, meta["config"], as_json(config))
    prepared = prepare(config, base, None if meta is None else meta["tokenizer"])
    corpus_sha256 = corpus.corpus_hash(prepared.files)
    params = init_params(config.model, config.seed)
    state = make_optimizer(config.optimizer).init(params)
    start, spent, history = 0, 0.0, []
    if meta is not None:
        if meta["corpus_sha256"] != corpus_sha256:
            raise QjaxError(f"{path}: was trained on other files than those here; delete it to start afresh")
        params, state = load_tree(path, (params, state))
        start, spent, history = meta["step"], meta["seconds"], meta["history"]

    end = config.optimizer.steps if stop_at is None else min(stop_at, config.optimizer.steps)
    clock = time.monotonic() - spent
    saved_at = time.monotonic()
    done = start

    def save() -> None:
        about = {
            "config": as_json(config),
            "corpus_sha256": corpus_sha256,
            "tokenizer": prepared.tokenizer.to_str(),
            "step": done,
            "seconds": time.monotonic() - clock,
            "history": history,
        }
        save_checkpoint(path, (params, state), about)

    with _progress() as progress:
        if start:
            progress.console.print(f"{path}: going on from step {start}", soft_wrap=True)
        bar = progress.add_task("training", total=config.optimizer.steps, completed=start, note="")
        try:
            for step in range(start, end):
                began = time.monotonic()
                batch = training_batch(
                    prepared.stream,
                    step,
                    config.optimizer.batch_size,
                    config.model.context_length,
                    config.seed,
                )
                params, state, loss = train_step(
                    params, state, jnp.asarray(batch), shape=config.model, optimizer=config.optimizer
                )
                done = step + 1
                loss = float(loss)
                rate = config.optimizer.batch_size * config.model.context_length / (time.monotonic() - began)
                progress.update(bar, completed=done, note=f"loss {loss:.3f}  {rate:.0f} tok/s")
                if done % config.evaluate_every == 0 or done == config.optimizer.steps:
                    ppl = heldout_perplexity(params, config.model, prepared.heldout_ids)
                    history.append({"step": done, "loss": loss, "heldout_perplexity": ppl})
                    seconds = time.monotonic() - clock
                    progress.console.print(f"{seconds:.0f} s  {rate:.0f} tok/s  {history[-1]}", soft_wrap=True)
                if time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                    save()
                    saved_at = time.monotonic()
        finally:
            # Also when interrupted: the next start goes on from here.
            if done > start:
                save()
    return Trained(params, prepared, done, time.monotonic() - clock, history)


def _refuse_other_config(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [key for key in expected if key not in FREE_TO_CHANGE and found.get(key) != expected[key]]
    if differing:
        raise QjaxError(
            f"{path}: belongs to a run with another {', '.join(differing)} than the config says; "
            "delete it to start afresh, or name another folder"
        )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def train_from_config(path: Path, *, resume: bool = True) -> Path:
    """Runs a training config to its end and writes the model and its record.

    Returns:
        The GGUF file's path; the record stands beside it, named `.json`.

    Raises:
        QjaxError: a mistake in the config, or a checkpoint of another run in its folder.
    """
    config = load_config(path)
    if not isinstance(config, TrainConfig):
        raise QjaxError(f"{path}: kind: expected 'train', got {config.kind!r}")
    trained = train(config, path.parent, resume=resume)
    prepared = trained.prepared
    params = round_to_f16(trained.params)
    output = path.parent / config.output
    write_model(output, config, params, prepared.tokenizer)
    n_tokens = trained.step * config.optimizer.batch_size * config.model.context_length
    facts = {
        "command": f"qjax run {path.parent.name}/{path.name}",
        "steps": trained.step,
        "tokens_seen": n_tokens,
        "passes_over_corpus": round(n_tokens / len(prepared.stream), 3),
        "seconds": round(trained.seconds),
        "heldout": {
            "perplexity": heldout_perplexity(params, config.model, prepared.heldout_ids),
            "method": "llama-perplexity: chunks of context_length, BOS first, second half scored",
            "context": config.model.context_length,
            "tokens": len(prepared.heldout_ids),
            "files": prepared.heldout_files,
        },
        "history": trained.history,
        "corpus": {
            "sha256": corpus.corpus_hash(prepared.files),
            "tokens": len(prepared.stream),
            "files": prepared.files,
        },
    }
    write_record(output.with_suffix(".json"), config, output, facts)
    return output
