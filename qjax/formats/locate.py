"""Where a model is: a file, a folder, the one that comes with qjax, or one on the Hugging Face Hub."""

import re
from pathlib import Path

from qjax.errors import QjaxError

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded.gguf"

# How long the Hub may take to answer at all.
REACH_SECONDS = 10.0

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
    """Path of a GGUF file (the first shard of a split one) or a Hugging Face folder; fetched if it is a Hub id.

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
        if not names and (path / "config.json").exists():
            return path
        return path / _one_of(names, str(path), "by its path")
    if path.exists():
        return path
    match = _HUB_ID.fullmatch(str(model))
    if match is None or (path.suffix == ".gguf" and match["file"] is None):
        raise QjaxError(f"{model}: no such file; give a .gguf file, a folder, 'embedded', or a Hub id owner/name")
    return fetch(match["repo"], match["file"])


def fetch(repo: str, file: str | None) -> Path:
    """Download a GGUF file, and its other shards, of a Hub repository into the Hub's own cache.

    Where the Hub cannot be reached, what the cache holds already is used.

    Args:
      repo: "owner/name".
      file: a file's name, or a part of it that only one model there has; None for the only model.

    Raises:
      QjaxError: the Hub cannot be reached, or has no such repository or file.
    """
    # Imported here: it takes a while, and most runs open a local file.
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    here = f"{repo}: there is no such file here, and"
    try:
        # Not `list_repo_files`, which asks a Hub that is out of reach for half a minute.
        listed = HfApi().model_info(repo, timeout=REACH_SECONDS).siblings or []
        names = [entry.rfilename for entry in listed if entry.rfilename.endswith(".gguf")]
        chosen = _choose(names, repo, file)
        return {name: Path(hf_hub_download(repo, name)) for name in _shards(chosen, names)}[chosen]
    except QjaxError:
        raise
    except GatedRepoError as error:
        raise QjaxError(f"{here} on the Hub it is gated: accept its terms there, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise QjaxError(f"{here} no such public repository on the Hub (is it private? `hf auth login`)") from error
    except Exception as error:  # its errors come from several HTTP libraries, by version
        folder = None if isinstance(error, HfHubHTTPError) else _cached(repo)
        if folder is not None:
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
            return folder / _choose(names, repo, file)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QjaxError(f"{here} it cannot be fetched from the Hub: {reason}") from error


def _cached(repo: str) -> Path | None:
    """The folder of the Hub's cache with what was fetched of a repository before, if anything."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
