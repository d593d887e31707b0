"""The text that the embedded model learns from: Python's own standard library, which is on every machine.

Which files belong is a fixed rule, so the same Python gives the same corpus: `*.py` below the standard
library's folder whose top-level name is in `sys.stdlib_module_names` (this leaves out the test suite,
site-packages and files that an installation generates), without folders of tests, tables of characters and
generated help text. `HELD_OUT` names modules that are never trained on; they exist in every Python from 3.11.
"""

import hashlib
import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path

from qjax.errors import QjaxError

HELD_OUT = (
    "bisect.py",
    "configparser.py",
    "fractions.py",
    "gzip.py",
    "heapq.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)

# Folders whose files are no prose of programmers: tests, code tables, generated documentation.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "test", "tests", "idle_test", "idlelib", "encodings", "pydoc_data", "site-packages"}
)


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def corpus_files(folder: Path | None = None) -> list[str]:
    """Names (posix, relative to the folder) of all files of the corpus, sorted.

    Args:
        folder: a folder of `*.py` files; None is the standard library, of which only listed modules count.

    Raises:
        QjaxError: where no file is found (for example a Python whose library is one zip file).
    """
    root = stdlib_folder() if folder is None else folder
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in names if _belongs(name, stdlib=folder is None)]
    if not kept:
        raise QjaxError(f"{root}: expected *.py files to train on, found none; name another corpus folder")
    return kept


def _belongs(name: str, *, stdlib: bool) -> bool:
    parts = name.split("/")
    if SKIPPED_FOLDERS.intersection(parts[:-1]):
        return False
    return not stdlib or parts[0].removesuffix(".py") in sys.stdlib_module_names


def training_files(folder: Path | None = None, held_out: Sequence[str] = HELD_OUT) -> list[str]:
    """Names of the files that are trained on: the corpus without the held-out ones."""
    return [name for name in corpus_files(folder) if name not in set(held_out)]


def read_file(name: str, folder: Path | None = None) -> str:
    """One file's text, decoded as Python itself would (coding cookie, universal newlines)."""
    path = (stdlib_folder() if folder is None else folder) / name
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise QjaxError(f"{path}: expected a readable Python file, got {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def heldout_text(folder: Path | None = None, held_out: Sequence[str] = HELD_OUT) -> str:
    """The held-out files of the running Python, one after the other, in the order of their names."""
    return "\n".join(read_file(name, folder) for name in sorted(held_out))


def file_hashes(names: Iterable[str], folder: Path | None = None) -> dict[str, str]:
    """sha256 of each file's text as `read_file` gives it (so line endings on disk do not matter)."""
    return {name: hashlib.sha256(read_file(name, folder).encode()).hexdigest() for name in names}


def corpus_hash(hashes: dict[str, str]) -> str:
    """One sha256 over a list of files and their hashes."""
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(listing.encode()).hexdigest()
