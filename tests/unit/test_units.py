"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvvol.model.units import (
    SIZE_MAX,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (512, 512),
        ("512", 512),
        ("512B", 512),
        ("4KiB", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KB", 4000),
        ("4kB", 4000),
        (" 1.5 GiB ", 3 << 29),
        ("2TB", 2 * 10**12),
        ("1PiB", 1 << 50),
        ("7E", 7 << 60),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value", ["", "-1", -1, "4XiB", "1.5", "0.3KiB", "8EiB", True, None, 1.5, "4i", "4iB", "B", "9" * 5000]
)
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError):
        parse_size(value)


@given(st.integers(0, SIZE_MAX))
def test_a_formatted_size_reads_back_exactly(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [(0, 0), (1.5, 1.5), ("250ms", 0.25), ("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["", "30", "-1s", -1, True, float("inf"), float("nan"), None, "1w"])
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError):
        parse_duration(value)


@pytest.mark.parametrize(
    ("text", "rate"), [(4096, 4096), ("400MiB/s", 400 << 20), ("400MiB", 400 << 20), ("1GB/s", 10**9), ("5/s", 5)]
)
def test_rates(text: str | int, rate: int) -> None:
    assert parse_rate(text) == rate
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize("value", ["", "/s", "4MiB/m", "4MiB/s/s", "fast", -1, True, None, 1.5])
def test_what_is_no_rate(value: object) -> None:
    with pytest.raises(ValueError, match="such as 400MiB/s"):
        parse_rate(value)


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "100ms"), (0.001, "1ms"), (1, "1s"), (90, "90s"), (1.5, "1500ms")])
def test_a_formatted_duration_reads_back(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
    assert parse_duration(text) == seconds
