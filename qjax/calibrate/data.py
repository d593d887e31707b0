"""What a model is calibrated on: texts, conversations or token ids, cut into samples.

A text is tokenized as a whole and cut into consecutive samples that do not overlap; of more than are wanted, a seeded
draw without repetition is taken, in the order of the text. The first token of each is BOS where the model adds one, as
when its perplexity is measured. (GPTQ's reference draws random offsets in the whole text, llm-compressor shuffles
documents: with samples that do not overlap no token counts twice.)
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.hub import fetch_file
from qjax.models import ModelConfig
from qjax.models.chunks import begun, checked_ids
from qjax.text import Tokenizer, encode_chat
from qjax.text.files import read_text

WIKITEXT = "wikitext-2"
SAMPLES, SEQ_LEN = 128, 512
# In the archive that llama.cpp's scripts fetch, and where they unpack it.
_WIKITEXT_FILE = "wikitext-2-raw/wiki.train.raw"


class Calibration(NamedTuple):
    """What is looked at, and how much of it.

    data: a text file, "wikitext-2", a .jsonl file with a {"text": ...} or a {"messages": [...]} in each line, or token
      ids: whole numbers [n] of one text or [texts, n] of several, as an array or in a file (.npy, .npz, .json).
    samples: at most so many. seq_len: tokens of each; None for 512, or what the model takes at once, or (of several
      texts of equal length) all of a text. seed: of the draw, where there are more.
    """

    data: str | Path | np.ndarray | None = None
    samples: int = SAMPLES
    seq_len: int | None = None
    seed: int = 0


def calibration_tokens(
    wanted: Calibration, tokenizer: Callable[[], Tokenizer], config: ModelConfig
) -> Int32[np.ndarray, "samples seq"]:
    """The samples; the tokenizer is asked for where there is text.

    Raises:
      QjaxError: there is no data, it cannot be read, is shorter than a sample, or has ids that the model does not know;
        a number out of range.
    """
    data, samples, seq_len, seed = wanted
    if data is None:
        raise QjaxError("no calibration data: give a text file, 'wikitext-2', or token ids")
    if samples < 1:
        raise QjaxError(f"expected at least one sample, got {samples}")
    name, bos = "the token ids", None
    if isinstance(data, np.ndarray):
        rows = _rows_of(data, name)
    elif Path(data).suffix.lower() in (".npy", ".npz", ".json"):
        name, rows = str(data), _read_ids(Path(data))
    else:
        name, made = str(data), tokenizer()
        rows, bos = [np.fromiter(_text_ids(str(data), made), np.int64)], made.first_id
    if seq_len is None:
        lengths = {len(row) for row in rows}
        equal = len(rows) > 1 and len(lengths) == 1 and max(lengths) <= config.context
        seq_len = lengths.pop() if equal else min(SEQ_LEN, config.context)
    if not 2 <= seq_len <= config.context:
        raise QjaxError(f"expected samples of 2 to {config.context} tokens, the model's context, got {seq_len}")
    cut = [row[: len(row) // seq_len * seq_len].reshape(-1, seq_len) for row in rows]
    whole = np.concatenate(cut) if cut else np.zeros((0, seq_len), np.int64)
    if not len(whole):
        most = max(map(len, rows), default=0)
        raise QjaxError(f"{name}: {most} tokens, fewer than one sample of {seq_len}: give more, or shorter samples")
    found = begun(checked_ids(config, whole.reshape(-1)).reshape(whole.shape), bos)
    if len(found) < samples:
        warnings.warn(
            f"{name}: {len(found)} samples of {seq_len} tokens, fewer than the {samples} asked for",
            QjaxWarning,
            stacklevel=2,
        )
        return found
    return found[np.sort(np.random.default_rng(seed).choice(len(found), samples, replace=False))]


def _text_ids(data: str, tokenizer: Tokenizer) -> Iterator[int]:
    if data.lower().endswith(".jsonl"):
        for where, line in enumerate(read_text(data).splitlines(), 1):
            if line.strip():
                yield from _document_ids(line, tokenizer, f"{data}: line {where}")
        return
    text = wikitext() if data == WIKITEXT else read_text(data)
    yield from tokenizer.encode(text, add_bos=tokenizer.add_bos)


def _document_ids(line: str, tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QjaxError(f"{where}: not JSON: {error}") from None
    document = found if isinstance(found, dict) else {}
    text, messages = document.get("text"), document.get("messages")
    if isinstance(text, str):
        return tokenizer.encode(text, add_bos=tokenizer.add_bos)
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        try:
            return encode_chat(tokenizer, messages, add_generation_prompt=False)
        except (QjaxError, KeyError) as error:
            raise QjaxError(f"{where}: {error}") from error
    raise QjaxError(f'{where}: expected {{"text": "..."}} or {{"messages": [...]}}, got {line[:80]!r}')


def wikitext() -> str:
    """WikiText-2's training text: of ./wikitext-2-raw, as llama.cpp's script unpacks it, or through the Hub.

    Raises:
      QjaxError: it is not here and cannot be fetched.
    """
    here = Path(_WIKITEXT_FILE)
    if here.exists():
        return read_text(here)
    archive = fetch_file("ggml-org/ci", "wikitext-2-raw-v1.zip")
    try:
        with zipfile.ZipFile(archive) as file:
            return file.read(_WIKITEXT_FILE).decode("utf-8")
    except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise QjaxError(f"{archive}: cannot be read: {error}") from error


def _read_ids(path: Path) -> list[np.ndarray]:
    """Rows of token ids in a file."""
    try:
        if path.suffix.lower() == ".json":
            found: Any = json.loads(read_text(path))
            ragged = isinstance(found, list) and found and all(isinstance(row, list) for row in found)
            return [row for part in (found if ragged else [found]) for row in _rows_of(np.asarray(part), str(path))]
        if path.suffix.lower() == ".npy":
            # Mapped: what a header claims is held against the file's size before anything is allocated.
            return _rows_of(np.load(path, mmap_mode="r", allow_pickle=False), str(path))
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            if len(loaded.files) != 1:
                raise QjaxError(f"{path}: expected one array of token ids, got {', '.join(loaded.files) or 'none'}")
            return _rows_of(loaded[loaded.files[0]], str(path))
    except QjaxError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, RecursionError, zipfile.BadZipFile) as error:
        raise QjaxError(f"{path}: cannot be read as token ids: {' '.join(str(error).split())}") from error


def _rows_of(ids: np.ndarray, name: str) -> list[np.ndarray]:
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise QjaxError(f"{name}: expected whole numbers, in one row or in several, got {ids.dtype} {ids.shape}")
    return list(ids.reshape(-1, ids.shape[-1]).astype(np.int64))
