"""Where a model is: a file, a folder, the one that comes with qjax, or one on the Hugging Face Hub."""

import re
from pathlib import Path

from qjax.errors import QjaxError

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded.gguf"

_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<file>[\w./-]+))?")
_FIRST_OF_MANY = re.compile(r"-(?P<number>\d{5})-of-\d{5}\.gguf$")


def _one_of(names: list[str], where: str, how: str) -> str:
    """The only model among file names; of a split model, its first shard."""
    first = [name for name in names if (m := _FIRST_OF_MANY.search(name)) is None or m["number"] == "00001"]
    if not first:
        raise QjaxError(f"{where}: no .gguf file there; qjax reads GGUF files")
    if len(first) > 1:
        shown = ", ".join(sorted(first)[:8]) + (", ..." if len(first) > 8 else "")
        raise QjaxError(f"{where}: {len(first)} models there; name one {how}: {shown}")
    return first[0]


def locate(model: str | Path) -> Path:
    """Path of a GGUF file (the first shard of a split one); fetched from the Hub if it is an id of it.

    Args:
      model: a path, a folder with one model, "embedded", or a Hub id "owner/name" or "owner/name:file".

    Raises:
      QjaxError: nothing there, or more than one model.
    """
    if model == "embedded":
        return EMBEDDED
    path = Path(model)
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.suffix == ".gguf"]
        return path / _one_of(names, str(path), "by its path")
    if path.exists():
        return path
    match = _HUB_ID.fullmatch(str(model))
    if match is None or (path.suffix == ".gguf" and match["file"] is None):
        raise QjaxError(f"{model}: no such file; give a .gguf file, a folder, 'embedded', or a Hub id owner/name")
    return fetch(match["repo"], match["file"])


def fetch(repo: str, file: str | None) -> Path:
    """Download a GGUF file, and its other shards, of a Hub repository into the Hub's own cache.

    Raises:
      QjaxError: the Hub cannot be reached, or has no such repository or file.
    """
    # Imported here: it takes a while, and most runs open a local file.
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = [name for name in HfApi().list_repo_files(repo) if name.endswith(".gguf")]
        if file is not None and file not in names:
            names = [name for name in names if file.lower() in name.lower()]
        chosen = file if file in names else _one_of(names, f"Hub repository {repo}", f"as {repo}:FILE")
        assert chosen is not None
        many = _FIRST_OF_MANY.search(chosen)
        stem = chosen[: many.start()] if many else chosen
        shards = [n for n in names if many and n.startswith(stem) and _FIRST_OF_MANY.search(n)] or [chosen]
        paths = [Path(hf_hub_download(repo, name)) for name in sorted(shards)]
        return paths[0]
    except QjaxError:
        raise
    except Exception as error:  # its errors come from several HTTP libraries, by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QjaxError(f"cannot fetch {repo} from the Hub, and there is no such file here: {reason}") from error
