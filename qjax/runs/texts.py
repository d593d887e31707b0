"""The commands on text: generate, chat, tokenize, perplexity."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from qjax import api
from qjax.errors import QjaxError
from qjax.evaluate import perplexity
from qjax.evaluate.divergence import check_text, divergence, read_base, save_base
from qjax.evaluate.perplexity import Perplexity, check_finite, summarize
from qjax.formats.locate import locate
from qjax.formats.source import open_source
from qjax.models.chunks import chunks_of
from qjax.runs.console import console, emit, emit_json, progress_bar


def open_model(name: str, **options: Any) -> api.Model:
    """`api.load` with a progress bar."""
    # Before the bar, since a download has bars of its own.
    path = locate(name)
    with progress_bar(f"loading {name}") as advance:
        return api.load(path, progress=lambda _: advance(), **options)


def generate(model: api.Model, prompt: str, *, as_json: bool, echo: bool, **options: Any) -> dict[str, Any]:
    """Stream a continuation to stdout (or nothing, for JSON); give text, ids and speed."""
    ids = model.encode(prompt)
    start = time.perf_counter()
    made, pieces, arrivals = [], [], []
    if echo and not as_json:
        emit(prompt)
    for piece in model.stream(ids, **options):
        pieces.append(piece.text)
        if piece.id is not None:
            made.append(piece.id)
            arrivals.append(time.perf_counter())
        if not as_json:
            emit(piece.text)
    end = time.perf_counter()
    if not as_json:
        emit("\n")
    return {
        "text": "".join(pieces),
        "ids": made,
        "prompt_tokens": len(ids),
        "seconds": end - start,
        "tokens_per_second": decode_rate(arrivals),
        "first_token_seconds": arrivals[0] - start if arrivals else 0.0,
    }


def decode_rate(arrivals: Sequence[float]) -> float:
    """Tokens a second of decoding alone, from the times at which tokens came; 0 for fewer than three.

    When a token is handed out, the step for the next one is under way, or done where the device works at once. In
    both cases one step lies between a token and the next, save before the last one, after which nothing is to be
    computed: it may have been ready long before. So the time is taken from the first token (that of the prompt's run)
    to the last but one.
    """
    steps = len(arrivals) - 2
    return steps / (arrivals[-2] - arrivals[0]) if steps > 0 else 0.0


def chat(model: api.Model, system: str | None, **options: Any) -> None:
    """Talk on the terminal until end of input."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    console.print("Type a message; an empty line or Ctrl-D ends.", style="dim")
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = []
        for text in model.chat(messages, **options):
            emit(text)
            answer.append(text)
        emit("\n")
        messages.append({"role": "assistant", "content": "".join(answer)})


def _lines() -> Any:
    while True:
        if sys.stdin.isatty():
            console.print("> ", end="", style="bold")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise QjaxError("what was typed is not UTF-8 text") from error
        if not line.strip():
            return
        yield line.rstrip("\n")


def tokenize(model: str, text: str, *, bos: bool, parse_special: bool, as_json: bool) -> None:
    """Ids of a text and the text decoded back; weights are not loaded."""
    file = open_source(locate(model))
    tokenizer = api.read_tokenizer(file.metadata, file.path)
    ids = tokenizer.encode(text, add_bos=bos, parse_special=parse_special)
    if as_json:
        # Of the text alone: a BOS put in front is no part of it.
        put = 1 if bos and tokenizer.bos_id is not None else 0
        emit_json({"ids": ids, "text": tokenizer.decode(ids[put:], skip_special=False)})
    else:
        emit(" ".join(map(str, ids)), end="\n")


def measure_perplexity(
    model: api.Model,
    text: str,
    *,
    ctx: int,
    chunks: int | None,
    activations: Any = "float",
    kl_base: str | None = None,
    save_kl_base: bool = False,
) -> dict[str, Any]:
    """Perplexity of a text, with a bar that shows it so far; with a base file its divergence too, or the file is made.

    Raises:
      QjaxError: see `perplexity` and `read_base`; the base file is of another text.
    """
    bos = model.tokenizer.first_id
    ids: Sequence[int] = model.encode(text)
    if kl_base is not None:
        return _against_base(
            model, ids, kl_base, save_kl_base, ctx=ctx, chunks=chunks, activations=activations, bos=bos
        )
    with progress_bar("perplexity") as advance:
        result = perplexity(
            model.params,
            model.config,
            ids,
            n_ctx=ctx,
            bos_id=bos,
            chunks=chunks,
            activations=activations,
            progress=lambda done, total, so_far: advance(done, total, f"{so_far:.4f}"),
        )
    return _finite(model, result)


def _finite(model: api.Model, result: Perplexity) -> dict[str, Any]:
    check_finite(model.source, result.perplexity)
    return result._asdict()


def _against_base(
    model: api.Model,
    ids: Sequence[int],
    path: str,
    save: bool,
    *,
    ctx: int,
    chunks: int | None,
    activations: Any,
    bos: int | None,
) -> dict[str, Any]:
    with progress_bar("saving" if save else "divergence") as advance:
        show = lambda done, total, so_far: advance(done, total, f"{so_far:.4f}")
        options: dict[str, Any] = {"bos_id": bos, "activations": activations, "progress": show}
        if save:
            cut = chunks_of(model.config, ids, n_ctx=ctx, bos_id=bos, chunks=chunks)
            start = time.perf_counter()
            losses = save_base(path, model.params, model.config, cut, **options)
            return _finite(model, summarize(losses, len(cut), time.perf_counter() - start))
        base = read_base(path, model.config)
        check_text(base, ids)
        found = divergence(model.params, model.config, base, chunks=chunks, **options)
    return {**_finite(model, found.perplexity), **{k: v for k, v in found._asdict().items() if k != "perplexity"}}
