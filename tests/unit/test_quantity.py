"""Sizes, durations and parameter counts."""

import pytest

from mmd.errors import MmdError
from mmd.quantity import format_count, format_duration, format_size, parse_count, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("18GiB", 18 << 30),
        ("2GB", 2_000_000_000),
        ("512MiB", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("7B", 7),
        ("0B", 0),
        ("3kB", 3000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5min", 300), ("2h", 7200), ("1d", 86400), ("1.5 s", 1.5), ("50us", 5e-05)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(("text", "count"), [("7.6B", 7.6e9), ("350M", 3.5e8), ("1.1T", 1.1e12), ("22K", 22000)])
def test_counts(text: str, count: float) -> None:
    assert parse_count(text) == count
    assert format_count(count) == text


@pytest.mark.parametrize("text", ["18", "18 gib", "GiB", "-1GiB", "1e3GiB", "18GiB\n", "٣GiB", "1.GiB", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(MmdError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["5", "5m", "5 minutes", "off", "-1s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(MmdError, match="is not a duration"):
        parse_duration(text)


def test_formats_are_short() -> None:
    assert [format_size(size) for size in (0, 24 << 30, 2 * 10**9, 1025)] == ["0B", "24GiB", "2GB", "1025B"]
    assert [format_duration(s) for s in (0, 0.05, 90, 3600, 86400)] == ["0s", "50ms", "90s", "1h", "1d"]
