"""Where a model is: a file, a folder, the one that comes with qjax, or one on the Hugging Face Hub."""

from pathlib import Path

from qjax.errors import QjaxError
from qjax.formats.hub import fetch, hub_id, one_model

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded.gguf"


def locate(model: str | Path) -> Path:
    """Path of a GGUF file (the first shard of a split one) or a Hugging Face folder; fetched if it is a Hub id.

    Args:
      model: a path, a folder with one model, "embedded", or a Hub id "owner/name", "owner/name@revision",
        "owner/name:file" or "owner/name@revision:file"; see `needed_files` for what is taken of a repository.

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
        return path / one_model(names, str(path), "by its path")
    if path.exists():
        return path
    wish = hub_id(str(model))
    if wish is None:
        raise QjaxError(f"{model}: no such file; give a .gguf file, a folder, 'embedded', or a Hub id owner/name")
    return fetch(wish)
