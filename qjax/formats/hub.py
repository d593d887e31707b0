"""Models on the Hugging Face Hub: which files of a repository make a model, and fetching just these.

huggingface_hub does the transport, the cache in the user's home, the progress bars, and the token (HF_TOKEN, or that of
`hf auth login`). A connection that breaks goes on where it stopped. Pickles (.bin, .pth) are never fetched.
"""

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qjax.errors import QjaxError

# How long the Hub may take to answer at all.
REACH_SECONDS = 10.0

# As file wish: the safetensors of a repository that has GGUF files too.
SAFETENSORS = "safetensors"

# What git allows in the name of a branch or tag is more, but not ":".
_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>(?!.*\.\.)\w[\w./+-]*))?(?::(?P<file>[\w./-]+))?",
)
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<kind>gguf|safetensors)")
# Beside the weights: what a model is, and its tokenizer in every form that there is.
_FOLDER_FILES = re.compile(
    r"(config|generation_config|quantize_config|quant_config|quantization_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer\.(json|model)|tokenizer_config\.json|merges\.txt|chat_template[^/]*\.(json|jinja)"
    r"|model\.safetensors\.index\.json|README\.md"
)
_FOLDER_WEIGHTS = re.compile(r"(gptq_)?model[^/]*\.safetensors")


class HubId(NamedTuple):
    """`owner/name[@revision][:file]`: a branch, tag or commit; a file's name or a part of it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def where(self) -> str:
        return f"Hub repository {self._replace(file=None)}"


def hub_id(text: str) -> HubId | None:
    """The parts of an id; None if the text cannot be one."""
    match = _ID.fullmatch(text)
    if match is None or (match["file"] is None and text.endswith(".gguf")):
        return None
    return HubId(**match.groupdict())


def one_model(names: Sequence[str], where: str, how: str) -> str:
    """The only model among names of GGUF files; of a split one, its first shard.

    Raises:
      QjaxError: there are more, or none; `how` to name one.
    """
    first = [name for name in names if (m := _SHARD.fullmatch(name)) is None or m["number"] == "00001"]
    if not first:
        raise QjaxError(
            f"{where}: no .gguf file there, nor config.json; qjax reads GGUF files and Hugging Face folders"
        )
    if len(first) > 1:
        raise QjaxError(f"{where}: {len(first)} models there; name one {how}: {_listed(first)}")
    return first[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")


def needed_files(names: Sequence[str], wish: HubId) -> tuple[list[str], str]:
    """Which files of a repository make the model, and which of them opens it; "" for their folder.

    GGUF files come first: the one wished for, or the only one, with its other shards. Without any, or by the wish
    "safetensors", those of a Hugging Face folder.

    Raises:
      QjaxError: no model, or several, or shards that are missing.
    """
    ggufs = [name for name in names if name.endswith(".gguf")]
    if wish.file == SAFETENSORS or (wish.file is None and not ggufs and "config.json" in names):
        return _folder_files(names, wish), ""
    chosen = _chosen(ggufs, wish)
    return _with_shards(chosen, names, wish), chosen


def _chosen(names: list[str], wish: HubId) -> str:
    """The GGUF file that the wish names: by its name, or by a part that only one model has."""
    if wish.file is not None and wish.file not in names:
        found = [name for name in names if wish.file.lower() in name.lower()]
        if names and not found:
            raise QjaxError(
                f"{wish.where}: no .gguf file there has {wish.file!r} in its name; there are {_listed(names)}"
            )
        names = found
    elif wish.file is not None:
        return wish.file
    return one_model(names, wish.where, f"as {wish._replace(file='FILE')}")


def _with_shards(chosen: str, names: Sequence[str], wish: HubId) -> list[str]:
    """The chosen file, or all shards of the model that it is one of."""
    shard = _SHARD.fullmatch(chosen)
    if shard is None:
        return [chosen]
    stem, _, count, kind = shard.groups()
    shards = [f"{stem}-{number:05d}-of-{count}.{kind}" for number in range(1, int(count) + 1)]
    missing = set(shards).difference(names)
    if missing:
        raise QjaxError(f"{wish.where}: {len(missing)} of {len(shards)} shards are missing, {min(missing)} first")
    return shards


def _folder_files(names: Sequence[str], wish: HubId) -> list[str]:
    weights = [name for name in names if _FOLDER_WEIGHTS.fullmatch(name)]
    if "config.json" not in names or not weights:
        raise QjaxError(
            f"{wish.where}: no {'model.safetensors' if 'config.json' in names else 'config.json'} there; "
            "qjax reads GGUF files and Hugging Face folders with safetensors, never pickles (.bin, .pth)"
        )
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    for name in weights:
        _with_shards(name, weights, wish)
    return [name for name in names if name in weights or _FOLDER_FILES.fullmatch(name)]


def fetch(wish: HubId, take: Callable[[HubId, list[str]], Path] | None = None) -> Path:
    """Download what is needed of a repository into the Hub's own cache.

    Where the Hub cannot be reached, what the cache holds already is used.

    Args:
      take: downloads files of the repository in some other way, and gives their folder.

    Returns:
      The GGUF file (the first shard, or the one that was named), or the folder of a Hugging Face model.

    Raises:
      QjaxError: the Hub cannot be reached, or refuses, or has no such repository, revision or file.
    """
    # Imported here: it takes a while, and most runs open a local file.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    here = f"{wish}: there is no such file here, and"
    try:
        # Not `list_repo_files`, which asks a Hub that is out of reach for half a minute.
        siblings = HfApi().model_info(wish.repo, revision=wish.revision, timeout=REACH_SECONDS).siblings or []
        files, opening = needed_files([entry.rfilename for entry in siblings], wish)
        return (take or snapshot)(wish, files) / opening
    except QjaxError:
        raise
    except GatedRepoError as error:
        raise QjaxError(
            f"{here} on the Hub it is gated: accept its terms there, then set HF_TOKEN or `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise QjaxError(
            f"{here} no such public repository on the Hub (is it private? set HF_TOKEN or `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise QjaxError(f"{here} on the Hub it has no branch, tag or commit {wish.revision!r}") from error
    except Exception as error:  # its errors come from several HTTP libraries, by version
        reason = " ".join(str(error).split()) or type(error).__name__
        # An answer, if not "come back later", is final.
        status = getattr(getattr(error, "response", None), "status_code", 503)
        cached = cached_model(wish) if status >= 500 else None
        if isinstance(cached, Path):
            return cached
        more = f"; in its cache: {cached}" if cached else ""
        raise QjaxError(f"{here} it cannot be fetched from the Hub: {reason}{more}") from error


def snapshot(wish: HubId, files: Sequence[str]) -> Path:
    """These files of one commit, even if there is a new one meanwhile, in a folder of the Hub's own cache."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in files]
    bars = _terminal_bars()
    return Path(snapshot_download(wish.repo, revision=wish.revision, allow_patterns=patterns, tqdm_class=bars))


def fetch_file(repo: str, name: str) -> Path:
    """A file of a data set's repository, in the Hub's own cache; what is there already is not asked for again.

    Raises:
      QjaxError: the Hub cannot be reached, or refuses, or has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"repo_id": repo, "filename": name, "repo_type": "dataset"}
    try:
        return Path(hf_hub_download(**options, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(hf_hub_download(**options, etag_timeout=REACH_SECONDS, tqdm_class=_terminal_bars()))
    except Exception as error:  # its errors come from several HTTP libraries, by version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QjaxError(f"data set {repo}: {name} cannot be fetched from the Hub: {reason}") from error


def _terminal_bars() -> type:
    """The Hub's progress bars, which are drawn on a terminal only."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # None is tqdm's word for that.
            super().__init__(*args, **kwargs | {"disable": kwargs.get("disable") or None})

    return Bars


def cached_model(wish: HubId) -> Path | QjaxError | None:
    """What was fetched before; an error if that is no whole model, None if it is nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # No pattern: it shall not look for files that were never asked for.
        folder = Path(snapshot_download(wish.repo, revision=wish.revision, local_files_only=True, allow_patterns=[]))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return folder / needed_files(names, wish)[1]
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    except QjaxError as error:
        return error
