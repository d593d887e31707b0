"""Where qjax keeps what it can make again: compiled programs."""

import os
from pathlib import Path


def cache_root() -> Path | None:
    """The user's cache folder for qjax; None where there is to be none.

    QJAX_CACHE names another folder; "off" turns caching off, as does a user without a home.
    """
    named = os.environ.get("QJAX_CACHE", "")
    if named == "off":
        return None
    try:
        return Path(named) if named else Path.home() / ".cache" / "qjax"
    except RuntimeError:  # no home
        return None
