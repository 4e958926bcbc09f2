"""What `python -m perf qos` measured, read from a result's points: what got through over what was asked, and for how
long requests were held back.

A point is a VVol with a limit under one load, or one of several VVols that divide a busy reactor by their shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf.model import PointResult, Sample

SUITE = "qos"
LIMIT, REACTORS, SECONDS = "limit", "reactors", "seconds"
ASKED, BOUND = "requests a second asked for", "latency bound, µs"
SHARES, OF = "shares", "of shares"
"""What a point's spec says beside the load: of a limit the first five, of a share the last two and SECONDS."""


@dataclass(frozen=True)
class Case:
    """A VVol's limit under one load, whose requests it all holds back."""

    name: str
    spec: dict[str, str]
    sample: Sample
    asked: float
    """Requests a second that the limit lets through."""
    bound_us: float
    """The longest that a request may take, but for what the machine needs to wake up (docs/performance.md)."""

    @property
    def depth(self) -> int:
        """Requests in flight. With one, the bound is little more than the time that a machine takes to wake up."""
        return int(self.spec["depth"])

    @property
    def obtained(self) -> float:
        """What got through over what was asked for."""
        return self.sample.iops / self.asked

    @property
    def waited(self) -> float:
        """The 99.9th percentile of latency over the bound."""
        return self.sample.latency.p999_us / self.bound_us


@dataclass(frozen=True)
class Part:
    """One of several VVols that keep a reactor busy together."""

    name: str
    shares: int
    of: int
    """The shares of all."""
    sample: Sample
    together: float
    """Requests a second of all."""

    @property
    def obtained(self) -> float:
        """What it got over its part of what all got."""
        return self.sample.iops / self.together / (self.shares / self.of)


def _of(points: Sequence[PointResult], key: str) -> list[PointResult]:
    return [point for point in points if point.suite == SUITE and key in point.spec and point.samples]


def cases(points: Sequence[PointResult]) -> list[Case]:
    """Limits, in the order they were measured."""
    return [
        Case(point.point, point.spec, point.samples[0], float(point.spec[ASKED]), float(point.spec[BOUND]))
        for point in _of(points, ASKED)
    ]


def parts(points: Sequence[PointResult]) -> list[Part]:
    """VVols with shares, in the order they were measured."""
    found = _of(points, SHARES)
    together = sum(point.samples[0].iops for point in found)
    return [
        Part(point.point, int(point.spec[SHARES]), int(point.spec[OF]), point.samples[0], together) for point in found
    ]


def seconds(points: Sequence[PointResult]) -> float:
    """How long each was measured; 0 of a result that has none."""
    return min((float(point.spec[SECONDS]) for point in points if point.suite == SUITE), default=0.0)


def obtained(points: Sequence[PointResult]) -> dict[str, float]:
    """By point: what got through, or was got, over what should be; 1 is exact."""
    limited = {case.name: case.obtained for case in cases(points)}
    return limited | {part.name: part.obtained for part in parts(points)}


def _case_rows(points: Sequence[PointResult]) -> Iterator[list[str]]:
    for case in cases(points):
        latency = case.sample.latency
        yield [
            case.spec[LIMIT], case.spec["block"], case.spec["depth"], case.spec["connections"], case.spec[REACTORS],
            f"{case.asked:,.0f}", f"{case.sample.iops:,.0f}", f"{case.obtained:.4f}",
            *(f"{us / 1000:.2f}" for us in (latency.p50_us, latency.p999_us, latency.max_us, case.bound_us)),
            f"{case.waited:.2f}",
        ]  # fmt: skip


def _part_rows(points: Sequence[PointResult]) -> Iterator[list[str]]:
    for part in parts(points):
        latency = part.sample.latency
        yield [
            f"{part.shares} of {part.of}", f"{part.sample.iops:,.0f}", f"{part.together:,.0f}", f"{part.obtained:.4f}",
            f"{latency.p50_us / 1000:.2f}", f"{latency.p999_us / 1000:.2f}",
        ]  # fmt: skip


def _table(columns: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "| --- |" + " ---: |" * (len(columns) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


CASE_COLUMNS = (
    "limit", "block", "depth", "connections", "reactors", "asked, requests/s", "obtained", "obtained / asked", "p50 ms",
    "p99.9 ms", "longest ms", "bound ms", "p99.9 / bound",
)  # fmt: skip
PART_COLUMNS = ("shares", "requests/s", "of all", "obtained / its part", "p50 ms", "p99.9 ms")


def tables(points: Sequence[PointResult]) -> list[str]:
    """Both tables as lines of Markdown with a sentence each; nothing of a result that has none of it."""
    lines: list[str] = []
    if cases(points):
        said = (
            f"A VVol with a limit, {seconds(points):g} s under each load. Bound: the longest that a request may take."
        )
        lines += [said, "", *_table(CASE_COLUMNS, _case_rows(points)), ""]
    if parts(points):
        said = f"VVols that keep one reactor busy together, {seconds(points):g} s."
        lines += [said, "", *_table(PART_COLUMNS, _part_rows(points)), ""]
    return lines
