"""JSON of strangers: one object a file, or an error that names the file."""

import json
from pathlib import Path
from typing import Any

from qjax.errors import FormatError


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object of a text; `where` opens the error's message.

    Raises:
        FormatError: no JSON, no object, a key that stands twice, or nested without end.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {' '.join(str(error).split())}: download it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: see `parse_object`; or there is no such file, or it cannot be read.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_object(text, str(path))


def read_if_there(path: Path) -> dict[str, Any]:
    """`read_object`, or {} where there is no such file."""
    return read_object(path) if path.is_file() else {}
