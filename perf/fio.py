"""A typed model of fio's JSON output (fio 3.x, --output-format=json), as much of it as we use.

Unknown keys are ignored on purpose: fio adds some with every release. Source: fio's stat.c and the
HOWTO, "JSON output"; latencies are nanoseconds, bw_bytes is bytes per second.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class LatencyNs(_Part):
    """One latency block; fio leaves `percentile` out where there were no samples."""

    minimum: float = Field(default=0, alias="min")
    maximum: float = Field(default=0, alias="max")
    mean: float = 0
    stddev: float = 0
    count: int = Field(default=0, alias="N")
    percentile: dict[str, float] = {}

    def at(self, percent: float) -> float:
        """The percentile closest to `percent` that fio printed, 0 without samples."""
        if not self.percentile:
            return 0.0
        key = min(self.percentile, key=lambda k: abs(float(k) - percent))
        return self.percentile[key]


class Direction(_Part):
    """What one job did in one direction (read, write or trim)."""

    io_bytes: int = 0
    bw_bytes: float = 0
    iops: float = 0
    runtime_ms: float = Field(default=0, alias="runtime")
    total_ios: int = 0
    short_ios: int = 0
    drop_ios: int = 0
    clat_ns: LatencyNs = LatencyNs()
    lat_ns: LatencyNs = LatencyNs()


class Sync(_Part):
    """fsync and its kin; fio prints no rate for them."""

    total_ios: int = 0
    lat_ns: LatencyNs = LatencyNs()


class Job(_Part):
    """One job, or one group of jobs with group_reporting."""

    name: str = Field(alias="jobname")
    error: int = 0
    elapsed_s: float = Field(default=0, alias="elapsed")
    options: dict[str, str] = Field(default={}, alias="job options")
    read: Direction = Direction()
    write: Direction = Direction()
    trim: Direction = Direction()
    sync: Sync = Sync()
    user_cpu_percent: float = Field(default=0, alias="usr_cpu")
    system_cpu_percent: float = Field(default=0, alias="sys_cpu")
    context_switches: int = Field(default=0, alias="ctx")

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Those that did anything."""
        return tuple(d for d in (self.read, self.write, self.trim) if d.total_ios > 0)

    @property
    def requests(self) -> int:
        """I/Os answered, syncs included."""
        return sum(d.total_ios for d in self.directions) + self.sync.total_ios


class Report(_Part):
    """A whole output file."""

    version: str = Field(alias="fio version")
    timestamp_ms: int = 0
    global_options: dict[str, str] = Field(default={}, alias="global options")
    jobs: tuple[Job, ...]


class FioError(Exception):
    """fio's output is not what the model knows, or fio reported an error."""


def parse(text: str, source: str = "fio") -> Report:
    """Read fio's JSON. Lines before the first brace (fio's warnings) are skipped.

    Raises FioError: not JSON, several documents (--status-interval), missing parts, or a failed job.
    """
    start = text.find("{")
    if start < 0:
        raise FioError(f"{source}: no JSON in {len(text)} characters of output; run fio with --output-format=json")
    try:
        report = Report.model_validate(json.loads(text[start:]))
    except json.JSONDecodeError as error:
        raise FioError(f"{source}: not one JSON document ({error}); leave --status-interval away") from error
    except ValidationError as error:
        raise FioError(f"{source}: unknown shape: {error}") from error
    for job in report.jobs:
        if job.error:
            raise FioError(f"{source}: job {job.name} failed with error {job.error}")
    if not report.jobs:
        raise FioError(f"{source}: no jobs; is the --section's name right?")
    return report


def parse_file(path: Path) -> Report:
    """Read one output file."""
    return parse(path.read_text(), str(path))
