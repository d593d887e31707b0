"""Sizes as people write them: "3.5GiB", "500M", "1024"."""

import re

from qjax.errors import QjaxError

_SIZE = re.compile(
    r"\s*(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*(?:(?P<prefix>[kmgt])(?P<binary>i?)b?|b)?\s*", re.IGNORECASE | re.ASCII
)


def parse_size(text: str) -> int:
    """Bytes of a size: a number with K, M, G or T for powers of 1000, Ki, Mi, Gi or Ti for powers of 1024.

    A "B" at the end changes nothing, nor do capitals; a fraction of a byte is dropped.

    Raises:
      QjaxError: no such size, or less than a byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise QjaxError(f"expected a size such as 3.5GiB or 500M, got {text!r}")
    power = "kmgt".index(match["prefix"].lower()) + 1 if match["prefix"] else 0
    # Not by floats: 2**53 and more keep every digit.
    whole, _, fraction = match["number"].partition(".")
    count = int(whole + fraction) * (1024 if match["binary"] else 1000) ** power // 10 ** len(fraction)
    if count < 1:
        raise QjaxError(f"expected a size of at least one byte, got {text!r}")
    return count
