"""Result files: JSON with a line a sample, figures cut to what they mean, so that one is small and can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perf.model import COUNTS, FORMAT, Result

DIGITS = 5
LINES_DEEP = 4
"""Result, points, point, samples: these stand on lines of their own, what is below them does not."""
FOLDER = Path(__file__).with_name("results")


class ResultError(Exception):
    """A file that is no result."""


def _cut(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value:
        cut = float(f"{value:.{DIGITS}g}")
        return int(cut) if cut.is_integer() else cut
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    return [_cut(item) for item in value] if isinstance(value, list) else value


def _text(value: Any, deep: int) -> str:
    if deep == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_text(item, deep - 1) for item in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_text(item, deep - 1)}" for key, item in value.items()) + "\n}"


def dump(result: Result) -> str:
    """The file's text; figures have five significant digits, which is more than any clock here has."""
    return _text(_cut(result.model_dump(mode="json", exclude_none=True)), LINES_DEEP) + "\n"


def joined(old: Result, new: Result, all_suites: Sequence[str] = ()) -> Result:
    """`old` with the suites of `new` in place of its own, each with its stamp; the same for what is counted.

    A suite is replaced as a whole, for ratios are taken within it. Raises ResultError if these are figures of two
    machines, or only show that something runs. The result is complete once it has `all_suites` and counts."""
    for what in ("cpu", "cpus", "memory_bytes", "kernel"):
        before, now = getattr(old.machine, what), getattr(new.machine, what)
        if before != now:
            raise ResultError(f"one file holds one machine's figures: {what} was {before} and is {now}; use a new file")
    if old.quick or new.quick:
        raise ResultError("a --quick run says nothing about speed and is joined to no other; leave --quick out")
    fresh = set(new.measured())
    order = list(dict.fromkeys([*old.measured(), *new.measured()]))
    kept = [point for point in old.points if point.suite not in fresh]
    points = sorted([*kept, *new.points], key=lambda point: order.index(point.suite))
    skipped = {who: why for who, why in old.skipped.items() if who.partition("/")[0] not in fresh}
    stamps = {name: result.stamp(name) for result in (old, new) for name in result.measured()}
    return new.model_copy(
        update={
            "points": tuple(points), "skipped": skipped | new.skipped, "stamps": stamps,
            "counts": new.counts or old.counts, "complete": {*all_suites, COUNTS} <= set(stamps),
        }
    )  # fmt: skip


def load(path: Path) -> Result:
    """Read a result file. Raises ResultError with the reason."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise ResultError(f"{path}: not a result file of format {FORMAT}: {error.error_count()} problems") from error
