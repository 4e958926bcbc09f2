"""A result's charts, as small PNG files: bars for each suite, latency percentiles at depth 1, the scaling curve.

Needs matplotlib (the `perf` extra). Sixteen colours are enough for bars and lines, and a chart stays below 40 KB.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perf import limits, stats
from perf.model import PointResult, Result
from perf.peers import CEILING, OUR_FORMS, STORAGE

DPI = 80
COLOURS = 16
OURS_COLOUR, CEILING_COLOUR, OTHER_COLOUR, INK = "#c0392b", "#d9dde0", "#7f8c8d", "#2c3e50"
PERCENTILES = ("p50", "p90", "p99", "p99.9")


def colour_of(peer: str) -> str:
    """Ours stands out, limits stand back."""
    if peer in OUR_FORMS:
        return OURS_COLOUR
    return CEILING_COLOUR if peer in (CEILING, STORAGE) else OTHER_COLOUR


def save(figure: Any, path: Path) -> Path:
    """A figure as a small PNG file; closes it."""
    from matplotlib import pyplot
    from PIL import Image

    full = io.BytesIO()
    figure.savefig(full, dpi=DPI, format="png")
    pyplot.close(figure)
    Image.open(full).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    return path


def _bars(axis: Any, point: PointResult, metric: stats.Metric, label: str) -> None:
    found = [(peer, stats.middle(point, peer, metric)) for peer in stats.peers_of(point)[::-1]]
    shown = [(peer, summary) for peer, summary in found if summary]
    values = [s.median for _, s in shown]
    errors = [[s.median - s.low for _, s in shown], [s.high - s.median for _, s in shown]]
    names = [peer for peer, _ in shown]
    axis.barh(names, values, xerr=errors, color=[colour_of(peer) for peer in names], ecolor=INK)
    axis.set_title(f"{point.point}: {label}", fontsize=9, loc="left")


def _tidy(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def suite_chart(points: list[PointResult], path: Path) -> Path:
    """Rate and server CPU of every server, a row a point, with quartiles."""
    from matplotlib import pyplot

    size = (11, 0.8 + 1.9 * len(points))
    figure, axes = pyplot.subplots(len(points), 2, figsize=size, squeeze=False, layout="constrained")
    for row, point in zip(axes, points, strict=True):
        for axis, metric, label in ((row[0], stats.iops, "IOPS"), (row[1], stats.cpu_us, "server CPU µs/request")):
            _bars(axis, point, metric, label)
            _tidy(axis)
    return save(figure, path)


def latency_chart(point: PointResult, path: Path) -> Path:
    """Latency percentiles of every server at one point."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    metrics = (stats.p50_us, stats.p90_us, stats.p99_us, stats.p999_us)
    for peer in stats.peers_of(point):
        found = [stats.middle(point, peer, metric) for metric in metrics]
        middles = [summary.median for summary in found if summary]
        style = "--" if peer in (CEILING, STORAGE) else "-"
        width = 2.5 if peer in OUR_FORMS else 1.2
        axis.plot(PERCENTILES[: len(middles)], middles, style, label=peer, linewidth=width, marker="o", markersize=3)
    axis.set_yscale("log")
    axis.set_title(f"{point.suite}/{point.point}: latency, µs", fontsize=9, loc="left")
    axis.legend(fontsize=7, frameon=False)
    _tidy(axis)
    return save(figure, path)


def scaling_chart(points: list[PointResult], path: Path) -> Path:
    """Requests per server CPU-second, and per second, over connections; a line a number of reactors and direction."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    metrics = ((stats.iops_per_cpu, "IOPS per server CPU-second"), (stats.iops, "IOPS"))
    for axis, (metric, label) in zip(axes, metrics, strict=True):
        for peer, mix, line in _lines(points, metric):
            axis.plot([str(c) for c, _ in line], [v for _, v in line], marker="o", markersize=3, label=f"{peer}, {mix}")
        axis.set_title(f"{label}, by connections of depth 32", fontsize=9, loc="left")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
        _tidy(axis)
    return save(figure, path)


def _lines(points: list[PointResult], metric: stats.Metric) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    peers = dict.fromkeys(peer for point in points for peer in stats.peers_of(point))
    for peer in peers:
        for mix in dict.fromkeys(point.spec.get("mix", "") for point in points):
            mine = [p for p in points if p.spec.get("mix", "") == mix]
            line = [(int(p.spec.get("connections", "1")), stats.middle(p, peer, metric)) for p in mine]
            yield peer, mix, sorted((count, summary.median) for count, summary in line if summary)


def limits_chart(points: list[PointResult], path: Path) -> Path:
    """What each limit let through, and how long requests were held back, over what it should be."""
    from matplotlib import pyplot

    cases = limits.cases(points)[::-1]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.8 + 0.24 * len(cases)), sharey=True, layout="constrained")
    shown = (
        ("obtained / asked", [case.obtained for case in cases]),
        ("p99.9 latency / its bound", [case.waited for case in cases]),
    )
    for axis, (label, values) in zip(axes, shown, strict=True):
        axis.barh([case.name for case in cases], values, color=OURS_COLOUR)
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_title(label, fontsize=9, loc="left")
        _tidy(axis)
    return save(figure, path)


SPECIAL: dict[str, Callable[[list[PointResult], Path], Path]] = {
    "scaling": scaling_chart, limits.SUITE: limits_chart,
}  # fmt: skip
LATENCY_POINTS = (("core", "randread-4k-qd1"), ("disk", "randread-4k-qd1"))


def write(result: Result, folder: Path) -> list[Path]:
    """All charts of a result, NAME.png in `folder`."""
    import matplotlib as mpl

    mpl.use("agg")
    written = []
    for suite in dict.fromkeys(point.suite for point in result.points):
        points = [p for p in result.points if p.suite == suite and p.samples]
        if points:
            written.append(SPECIAL.get(suite, suite_chart)(points, folder / f"{suite}.png"))
    for point in result.points:
        if (point.suite, point.point) in LATENCY_POINTS and point.samples:
            written.append(latency_chart(point, folder / f"{point.suite}-latency.png"))
    return written
