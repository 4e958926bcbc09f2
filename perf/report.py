"""A result file as Markdown and charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from perf import bars, stats
from perf.model import Machine, PointResult, Result
from perf.peers import OURS
from perf.stats import Summary, summarise


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _ratio(ratio: Summary | None) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else ""


def peers_of(point: PointResult) -> list[str]:
    """In the order they first ran, ours first."""
    seen = dict.fromkeys(sample.peer for sample in point.samples)
    return sorted(seen, key=lambda peer: peer != OURS)


def _middle(values: Iterable[float | None]) -> Summary | None:
    return summarise(value for value in values if value is not None)


def _rows(point: PointResult) -> Iterable[str]:
    for peer in peers_of(point):
        mine = [s for s in point.samples if s.peer == peer]
        rate, cpu = _middle(s.iops for s in mine), _middle(s.server_cpu_us for s in mine)
        mean, p99 = _middle(s.latency.mean_us for s in mine), _middle(s.latency.p99_us for s in mine)
        memory = _middle(s.rss_anon_bytes for s in mine)
        against = stats.ratio(point.samples, OURS, [peer], stats.iops) if peer != OURS else None
        assert rate is not None
        cells = [
            peer, _number(rate.median), f"{rate.spread:.0%}", _ratio(against),
            _number(cpu.median if cpu else None), _number(mean.median if mean else None),
            _number(p99.median if p99 else None), _number(memory.median / (1 << 20) if memory else None),
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def point_table(point: PointResult) -> str:
    """One point: a row per peer."""
    spec = ", ".join(f"{key} {value}" for key, value in point.spec.items())
    lines = [
        f"#### {point.point}", "", f"{spec}", "",
        "| server | IOPS | spread | ours / it (quartiles) | server CPU µs/request | mean µs | p99 µs | private MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *_rows(point),
    ]  # fmt: skip
    return "\n".join([*lines, *(f"\nFailed: {failure}" for failure in point.failures)])


def bar_table(verdicts: Sequence[bars.Verdict]) -> str:
    """The bars and what was measured."""
    lines = ["| work | what | bar | measured (quartiles) | reached |", "| --- | --- | ---: | ---: | --- |"]
    words = {True: "yes", False: "**no**", None: "not measured"}
    for v in verdicts:
        bar = f"{'≥' if v.bar.relation == '>=' else '≤'} {v.bar.factor:.2f}"
        lines.append(
            f"| {v.bar.suite}/{v.bar.point} | {v.bar.label} | {bar} | {_ratio(v.ratio)} | {words[v.reached]} |"
        )
    return "\n".join(lines)


def machine_lines(machine: Machine) -> list[str]:
    """The machine in a few lines."""
    processors = f"{machine.cpus} × {machine.cpu}, {machine.memory_bytes / (1 << 30):.0f} GiB"
    return [
        f"- {processors}, virtual: {machine.virtual}, governor: {machine.governor}",
        f"- Linux {machine.kernel}; disk {machine.disk}",
        f"- mitigations: {machine.mitigations}",
        "- " + "; ".join(f"{name}: {version}" for name, version in machine.versions.items()),
    ]


def markdown(result: Result) -> str:
    """The whole report."""
    lines = [
        "# Measured",
        "",
        f"{result.started}, commit {result.commit}, {result.rounds} rounds of {result.seconds} s,",
    ]
    lines.append("interleaved; medians over the rounds, spread = interquartile range / median, ratios within a round.")
    if result.quick:
        lines += ["", "**A --quick run: it shows that everything runs, and nothing about speed.**"]
    if result.load_before > 0.5:
        lines += ["", f"**The machine was not idle: load {result.load_before:.1f} before the run.**"]
    lines += ["", *machine_lines(result.machine), ""]
    verdicts = bars.judge(result.points)
    if any(v.ratio for v in verdicts):
        lines += ["## Bars", "", bar_table(verdicts), ""]
    suite = ""
    for point in result.points:
        if point.suite != suite:
            suite = point.suite
            lines += [f"## {suite}: {point.generator}, {point.backend}, {point.transport}", ""]
        lines += [point_table(point), ""]
    if result.counts:
        lines += ["## Counts", "", "| server | work | what | value |", "| --- | --- | --- | ---: |"]
        lines += [f"| {c.peer} | {c.work} | {c.name} | {_number(c.value, 4)} |" for c in result.counts] + [""]
    if result.skipped:
        lines += ["## Left out", "", *(f"- {who}: {why}" for who, why in result.skipped.items()), ""]
    return "\n".join(lines)


def charts(result: Result, folder: Path) -> list[Path]:
    """One SVG per suite: IOPS with quartiles, and server CPU per request. Needs matplotlib (the `perf` extra)."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    written = []
    for suite in dict.fromkeys(point.suite for point in result.points):
        points = [p for p in result.points if p.suite == suite and p.samples]
        if not points:
            continue
        figure, axes = pyplot.subplots(
            len(points), 2, figsize=(11, 1.2 + 1.9 * len(points)), squeeze=False, layout="constrained"
        )
        for row, point in zip(axes, points, strict=True):
            for axis, metric, label in ((row[0], stats.iops, "IOPS"), (row[1], stats.cpu_us, "server CPU µs/request")):
                _draw(axis, point, metric, label)
        path = folder / f"{suite}.svg"
        figure.savefig(path)
        pyplot.close(figure)
        written.append(path)
    return written


def _draw(axis, point: PointResult, metric: stats.Metric, label: str) -> None:  # type: ignore[no-untyped-def]
    peers = peers_of(point)[::-1]
    middles = [_middle(metric(s) for s in point.samples if s.peer == peer) for peer in peers]
    shown = [(peer, middle) for peer, middle in zip(peers, middles, strict=True) if middle]
    values = [m.median for _, m in shown]
    errors = [[m.median - m.low for _, m in shown], [m.high - m.median for _, m in shown]]
    colours = ["#c0392b" if peer == OURS else "#7f8c8d" for peer, _ in shown]
    axis.barh([peer for peer, _ in shown], values, xerr=errors, color=colours, ecolor="#2c3e50")
    axis.set_title(f"{point.point}: {label}", fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def write(result: Result, source: Path) -> list[Path]:
    """Beside the JSON: NAME.md, and a folder NAME of charts."""
    text = source.with_suffix(".md")
    text.write_text(markdown(result))
    folder = source.with_suffix("")
    folder.mkdir(exist_ok=True)
    return [text, *charts(result, folder)]
