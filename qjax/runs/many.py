"""Many prompts from a JSONL file to another one, in order, resumed where a killed run stopped."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qjax import api
from qjax.errors import FormatError, QjaxError
from qjax.formats.atomic import atomic_file, check_writable
from qjax.formats.pieces import fingerprint
from qjax.runs.console import progress_bar
from qjax.text import encode_chat

# A line longer than this is no prompt.
MOST_BYTES = 1 << 24


def generate_many(
    open_model: Callable[[], api.Model],
    source: str,
    target: str,
    *,
    open_replicas: Sequence[Callable[[], api.Model]] = (),
    **options: Any,
) -> dict[str, Any]:
    """Continue each line {"prompt": "..."} or {"messages": [...]} of a file.

    Replicas are the same model on other devices: they share the prompts, and change no text.

    Lines {"index", "text", "ids", "stopped"} are kept beside `target` until all are there, and then take its name: a
    run of the same model, prompts and options that was killed goes on after the last whole one.

    Raises:
      QjaxError, FormatError: the files cannot be read or written, or a line is no prompt; names it.
    """
    lines = read_prompts(source)
    check_writable(target)
    model = open_model()
    prompts = [_ids(model, line) for line in lines]
    replicas = [opened().executor(options.get("activations")) for opened in open_replicas]
    partial = Path(f"{target}.partial")
    head = {"qjax": "generate", "of": fingerprint([model.source, source], sorted(map(repr, options.items())))}
    found = resumed(partial, head)
    tokens, start = 0, time.perf_counter()
    with partial.open("r+b" if found else "wb") as file, progress_bar("texts", len(prompts)) as advance:
        file.seek(0, 2)
        if not found:
            _write(file, head)
        done = max(len(found) - 1, 0)
        advance(done, len(prompts))
        given = options | {"seed": (options["seed"] + done) % (1 << 32)}
        given = {key: value for key, value in given.items() if value is not None}
        for index, text in enumerate(model.generate_many(prompts[done:], replicas=replicas, **given), done):
            _write(file, {"index": index, **text._asdict()})
            tokens += len(text.ids)
            advance(index + 1, len(prompts))
    seconds = time.perf_counter() - start
    with atomic_file(target) as out, partial.open("rb") as file:
        next(file)
        out.writelines(file)
    partial.unlink()
    rate = tokens / seconds if seconds else 0.0
    return {"texts": len(prompts), "found": done, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate}


def _write(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    file.flush()


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file of prompts.

    Raises:
      FormatError, QjaxError: no such file, or a line that is none; names it.
    """
    try:
        with Path(path).open("rb") as file:
            return [_line(path, number, line) for number, line in _numbered(file, path) if line.strip()]
    except OSError as error:
        raise QjaxError(f"{path}: {error.strerror or error}") from error


def _numbered(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MOST_BYTES + 1):
        number += 1
        if len(line) > MOST_BYTES:
            raise FormatError(f"{path}:{number}: longer than {MOST_BYTES >> 20} MiB, which is no prompt")
        yield number, line


def _line(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(found, dict) or len(found.keys() & {"prompt", "messages"}) != 1:
        raise FormatError(f'{path}:{number}: expected {{"prompt": "..."}} or {{"messages": [...]}}')
    if "prompt" in found and not isinstance(found["prompt"], str):
        raise FormatError(f"{path}:{number}: expected a text as prompt, got {type(found['prompt']).__name__}")
    messages = found.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise FormatError(f"{path}:{number}: expected messages [{{'role': ..., 'content': ...}}, ...]")
    return {"where": f"{path}:{number}", **found}


def _ids(model: api.Model, line: dict[str, Any]) -> Sequence[int]:
    try:
        return model.encode(line["prompt"]) if "prompt" in line else encode_chat(model.tokenizer, line["messages"])
    except QjaxError as error:
        raise type(error)(f"{line['where']}: {error}") from error


def resumed(partial: Path, head: dict[str, Any]) -> list[bytes]:
    """The head and the whole lines of a run of the same that was killed; what is left of a torn one is cut off."""
    if not partial.exists():
        return []
    whole = []
    with partial.open("rb") as file:
        for number, line in enumerate(file):
            try:
                found = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                found = None
            if found != head if number == 0 else not isinstance(found, dict) or found.get("index") != number - 1:
                break
            whole.append(line)
    if whole:
        with partial.open("r+b") as file:
            file.truncate(sum(map(len, whole)))
    return whole
