"""Sizes, rates, durations and names as people write them.

A size is a count of bytes: an integer, or text such as `512`, `4KiB`, `1.5GiB`, `2TB` (IEC suffixes are
powers of 1024, SI suffixes powers of 1000; a bare K, M, G, T, P means IEC). A duration is seconds: a number,
or text such as `250ms`, `30s`, `5m`, `2h`. A rate is bytes a second: a size, with or without `/s` behind it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*((?:[KMGTPE]i?)?B?)\s*$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*$")
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86400)}
SIZE_MAX = (1 << 63) - 1


def parse_size(value: Any) -> int:
    """Bytes from an integer or text. Raises ValueError naming the value and the form wanted."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size; write bytes or a number with a unit, such as 4GiB")
    if isinstance(value, int):
        result = Fraction(value)
    else:
        found = _SIZE.match(value)
        if found is None:
            raise ValueError(f"{value!r} is not a size; write bytes or a number with a unit, such as 4GiB")
        unit = found[2].upper().removesuffix("B")
        base = 1000 if found[2].upper().endswith("B") and unit and not unit.endswith("I") else 1024
        result = Fraction(found[1]) * base ** _POWERS[unit.removesuffix("I")]
    if result.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    if not 0 <= result <= SIZE_MAX:
        raise ValueError(f"{value!r} is outside 0..{SIZE_MAX} bytes")
    return int(result)


def format_size(size_bytes: int) -> str:
    """The shortest exact IEC text of a size: 1073741824 is `1GiB`, 1000 is `1000B`."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        scale = 1024 ** _POWERS[unit[0]]
        if size_bytes and size_bytes % scale == 0:
            return f"{size_bytes // scale}{unit}"
    return f"{size_bytes}B"


def about_size(size_bytes: float) -> str:
    """About so many bytes, short: 1500 is `1.5KiB`, 20 << 20 is `20MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if round(size_bytes, 1) < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.1f}".removesuffix(".0") + unit if size_bytes < 10 else f"{size_bytes:,.0f}{unit}"


def about_time(seconds: float) -> str:
    """About so long, in the two largest units: `45s`, `12m 30s`, `3h 20m`, `2d 4h`."""
    left = max(round(seconds), 0)
    parts: list[str] = []
    for unit, scale in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= scale or (unit == "s" and not parts):
            parts.append(f"{left // scale}{unit}")
        elif parts:
            break
        left %= scale
    return " ".join(parts[:2])


def parse_duration(value: Any) -> float:
    """Seconds from a number or text. Raises ValueError naming the value and the form wanted."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a duration; write seconds or a number with a unit, such as 30s")
    if isinstance(value, str):
        found = _DURATION.match(value)
        if found is None:
            raise ValueError(f"{value!r} is not a duration; write seconds or a number with a unit, such as 30s")
        return float(Fraction(found[1]) * _SECONDS[found[2]])
    if not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is not a duration; it must be zero or more seconds")
    return float(value)


def format_duration(seconds: float) -> str:
    """The shortest text of a duration to the millisecond: 0.1 is `100ms`, 90.0 is `90s`."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds}ms" if milliseconds % 1000 else f"{milliseconds // 1000}s"


def parse_rate(value: Any) -> int:
    """Bytes a second from an integer or text. Raises ValueError naming the value and the form wanted."""
    try:
        return parse_size(value.removesuffix("/s") if isinstance(value, str) else value)
    except ValueError:
        raise ValueError(f"{value!r} is not a rate; write bytes a second, such as 400MiB/s") from None


def format_rate(rate: int) -> str:
    """The shortest exact IEC text of a rate: 1048576 is `1MiB/s`."""
    return f"{format_size(rate)}/s"


Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=int | str),
    Field(ge=0, description="bytes, or text such as 4GiB"),
]
PositiveSize = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=int | str),
    Field(gt=0, description="bytes, or text such as 4GiB"),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration, json_schema_input_type=float | str),
    Field(description="seconds, or text such as 30s"),
]

Rate = Annotated[
    int,
    BeforeValidator(parse_rate, json_schema_input_type=int | str),
    Field(description="bytes a second, or text such as 400MiB/s"),
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A datastore, host, profile, VM or short VVol name: 1 to 63 of letters, digits, `.`, `_`, `-`."""
