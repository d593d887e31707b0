"""A YAML file that a person wrote, read with its mistakes named."""

from pathlib import Path
from typing import Any

import yaml

from qjax.errors import QjaxError

YAML_ENDINGS = (".yaml", ".yml")


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The keys and values of a YAML file; a key may be a number, or nothing.

    Raises:
      QjaxError: it cannot be read, is not YAML, or holds something else at its top.
    """
    try:
        # Not by PyYAML's loader in C: a file of brackets alone makes it run out of stack and the process end.
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QjaxError(f"{path}: expected a readable YAML file, got {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise QjaxError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise QjaxError(f"{path}: expected keys and values, got {type(data).__name__}")
    return data
