"""A run is one YAML file: `run` reads its `kind` and does what it says."""

from collections.abc import Callable
from pathlib import Path

from qjax.runs.config import load_config

__all__ = ["run"]


def _train(path: Path, resume: bool) -> Path:
    # Imported late: who wants only the corpus should not wait for optax.
    from qjax.runs.train import train_from_config

    return train_from_config(path, resume=resume)


def _quantize(path: Path, resume: bool) -> Path:
    from qjax.runs.quantize_config import quantize_from_config

    return quantize_from_config(path, fresh=not resume)


RUNNERS: dict[str, Callable[[Path, bool], Path]] = {"train": _train, "quantize": _quantize}


def run(path: str | Path, *, resume: bool = True) -> Path:
    """Does the run that a config file describes and returns the path of what it made.

    Raises:
        QjaxError: unknown kind, or any mistake in the file.
    """
    path = Path(path)
    return RUNNERS[load_config(path).kind](path, resume)
