"""A saved model to the Hugging Face Hub: huggingface_hub does the transport, and knows the token (HF_TOKEN)."""

import os
from pathlib import Path

from qjax.errors import QjaxError
from qjax.formats.hub import hub_id


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload a folder, or one file, to a repository, which is made if there is none; returns where it is.

    Args:
      repo_id: "owner/name", or "owner/name@branch" of a branch that is there. private: of a repository that is made.
      message: of the commit.

    Raises:
      QjaxError: nothing to upload, no such id, no right to write there, or the Hub cannot be reached.
    """
    path, wish = Path(folder), hub_id(repo_id)
    if wish is None or wish.file is not None:
        raise QjaxError(f"{repo_id}: expected a repository's id, owner/name or owner/name@branch")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise QjaxError(f"{folder}: there is nothing to upload")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    where = {"repo_id": wish.repo, "revision": wish.revision, "commit_message": message or f"{path.name}, by qjax"}
    try:
        api.create_repo(wish.repo, private=private, exist_ok=True)
        if path.is_dir():
            api.upload_folder(folder_path=path, **where)
        else:
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, **where)
    except HFValidationError as error:
        raise QjaxError(f"{repo_id}: no id that the Hub knows: {' '.join(str(error).split())}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        reason = " ".join(str(error).split())
        hint = "; set HF_TOKEN to a token that may write, or `hf auth login`" if status in (401, 403) else ""
        raise QjaxError(f"{repo_id}: the Hub refuses ({status}): {reason}{hint}") from error
    except Exception as error:  # its errors come from several HTTP libraries, by version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QjaxError(f"{repo_id}: it cannot be uploaded to the Hub: {reason}") from error
    return f"{api.endpoint}/{wish.repo}"
