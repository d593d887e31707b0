"""Sizes as people write them."""

import pytest

from qjax.errors import QjaxError
from qjax.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("1024", 1024),
        ("7B", 7),
        ("2K", 2000),
        ("2kb", 2000),
        ("2KiB", 2048),
        ("2ki", 2048),
        ("500M", 500_000_000),
        ("0.5 MiB", 524_288),
        ("3.5GiB", 3_758_096_384),
        ("2g", 2_000_000_000),
        ("1.1T", 1_100_000_000_000),
        ("9007199254740993", 9_007_199_254_740_993),
        ("0.0015K", 1),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1e9", "1,5G", "1.G", "2GiBs", "2 GB x", "0", "0.0001K", "inf", "١G", "9" * 5000]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(QjaxError, match="expected a size"):
        parse_size(text)
