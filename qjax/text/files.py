"""Text of files."""

import sys
from pathlib import Path

from qjax.errors import QjaxError


def read_text(path: str | Path) -> str:
    """A text file as UTF-8; "-" is standard input.

    Raises:
      QjaxError: no such file, or not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise QjaxError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise QjaxError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
