"""Where a model is: a file, a folder, the one that comes with qjax, or one on the Hugging Face Hub."""

import re
from pathlib import Path

from qjax.errors import QjaxError

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded.gguf"

_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<file>[\w./-]+))?")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})(?P<count>-of-\d{5}\.gguf)")


def _one_of(names: list[str], where: str, how: str) -> str:
    """The only model among file names; of a split model, its first shard."""
    first = [name for name in names if (m := _SHARD.fullmatch(name)) is None or m["number"] == "00001"]
    if not first:
        raise QjaxError(f"{where}: no .gguf file there; qjax reads GGUF files")
    if len(first) > 1:
        raise QjaxError(f"{where}: {len(first)} models there; name one {how}: {_listed(first)}")
    return first[0]


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")


def _choose(names: list[str], repo: str, file: str | None) -> str:
    """The file of a Hub repository that `file` names: by its name, or by a part that only one model has."""
    where = f"Hub repository {repo}"
    if file is None or file in names:
        return file or _one_of(names, where, f"as {repo}:FILE")
    found = [name for name in names if file.lower() in name.lower()]
    if names and not found:
        raise QjaxError(f"{where}: no .gguf file there has {file!r} in its name; there are {_listed(names)}")
    return _one_of(found, where, f"as {repo}:FILE")


def _shards(chosen: str, names: list[str]) -> list[str]:
    """The chosen file, or all shards of the model that it is one of."""
    shard = _SHARD.fullmatch(chosen)
    if shard is None:
        return [chosen]
    same = re.compile(re.escape(shard["stem"]) + r"-\d{5}" + re.escape(shard["count"]))
    return sorted(name for name in names if same.fullmatch(name))


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
        chosen = _choose(names, repo, file)
        return {name: Path(hf_hub_download(repo, name)) for name in _shards(chosen, names)}[chosen]
    except QjaxError:
        raise
    except Exception as error:  # its errors come from several HTTP libraries, by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QjaxError(f"cannot fetch {repo} from the Hub, and there is no such file here: {reason}") from error
