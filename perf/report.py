"""A result file as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from perf import bars, charts, limits, stats
from perf.model import Count, Machine, PointResult, Result
from perf.stats import Summary, middle, peers_of

LOAD_MAX, OTHERS_MAX, STOLEN_MAX = 0.5, 0.05, 0.02
"""Above these the machine was not left alone: a load average, and shares of the processors."""
WORDS = {True: "reached", False: "**missed**", None: "not measured"}


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, more where the value is in the thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def quartiles(summary: Summary | None) -> str:
    """`median (first–third quartile)`, or the value alone where there is one only."""
    if summary is None:
        return ""
    if summary.count == 1:
        return f"{summary.median:.3g}"
    return f"{summary.median:.2f} ({summary.low:.2f}–{summary.high:.2f})"


def _mib(summary: Summary | None) -> str:
    return number(summary.median / (1 << 20)) if summary else ""


def _rows(point: PointResult) -> Iterable[str]:
    peers = peers_of(point)
    for peer in peers:
        rate = middle(point, peer, stats.iops)
        assert rate is not None
        against = stats.ratio(point.samples, peers[0], [peer], stats.iops) if peer != peers[0] else None
        metrics = (stats.cpu_us, stats.mean_us, stats.p50_us, stats.p99_us, stats.p999_us)
        medians = [number(found.median) if (found := middle(point, peer, metric)) else "" for metric in metrics]
        memory = [_mib(middle(point, peer, metric)) for metric in (stats.rss_bytes, stats.rss_anon_bytes)]
        cells = [peer, number(rate.median), f"{rate.spread:.0%}", quartiles(against), *medians, *memory]
        yield "| " + " | ".join(cells) + " |"


def point_table(point: PointResult) -> str:
    """One point: a row per server."""
    spec = ", ".join(f"{key} {value}" for key, value in point.spec.items())
    columns = ["server", "IOPS", "spread", "ours / it (quartiles)", "server CPU µs/request", "mean µs", "p50", "p99"]
    columns += ["p99.9", "resident MiB", "private MiB"]
    lines = [f"#### {point.point}", "", spec, "", *table_head(columns), *_rows(point)]
    return "\n".join([*lines, *(f"\nFailed: {failure}" for failure in point.failures)])


def table_head(columns: Sequence[str]) -> list[str]:
    """The first column to the left, figures to the right."""
    return ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]


def bar_table(verdicts: Sequence[bars.Verdict]) -> str:
    """The bars, what was measured, and whether it is enough."""
    lines = ["| work | what | asked | measured (quartiles) | |", "| --- | --- | ---: | ---: | --- |"]
    work = ""
    for v in verdicts:
        word = WORDS[v.reached] if v.asked != "published" or v.measured is None else ""
        lines.append(
            f"| {v.work if v.work != work else ''} | {v.label} | {v.asked} | {quartiles(v.measured)} | {word} |"
        )
        work = v.work
    return "\n".join(lines)


def tally(verdicts: Sequence[bars.Verdict]) -> str:
    """How many bars are reached, in a sentence."""
    judged = [v for v in verdicts if v.asked != "published"]
    reached, missed = (sum(v.reached is word for v in judged) for word in (True, False))
    unmeasured = len(judged) - reached - missed
    return f"{len(judged)} bars: {reached} reached, {missed} missed, {unmeasured} not measured."


def count_table(counts: Sequence[Count]) -> str:
    """What was counted, a row a server and load."""
    names = list(dict.fromkeys(count.name for count in counts))
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for count in counts:
        rows.setdefault((count.peer, count.work), {})[count.name] = count.value
    lines = table_head(["server", "load", *names])
    for (peer, work), values in rows.items():
        lines.append("| " + " | ".join([peer, work, *(number(values.get(name), 4) for name in names)]) + " |")
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


def _not_idle(result: Result) -> str:
    """What other processes took, where it was looked at; else the load before the run."""
    if not result.stamps:
        return f"load {result.load_before:.1f} before the run" if result.load_before > LOAD_MAX else ""
    said = []
    for suite, stamp in result.stamps.items():
        if stamp.others is not None and stamp.others > OTHERS_MAX:
            said.append(f"others took {stamp.others:.0%} of the processors during {suite}")
        elif stamp.others is None and stamp.load_before > LOAD_MAX:
            said.append(f"load {stamp.load_before:.1f} before {suite}")
    return ", ".join(said)


def warnings(result: Result) -> list[str]:
    """Why the figures may mean less than they seem to."""
    said = []
    if result.quick:
        said.append("A --quick run: it shows that everything runs, and nothing about speed.")
    if disturbed := _not_idle(result):
        said.append(f"The machine was not idle: {disturbed}.")
    stolen = max([result.stolen, *(stamp.stolen for stamp in result.stamps.values())])
    if stolen > STOLEN_MAX:
        said.append(f"The hypervisor gave up to {stolen:.0%} of the processors to others.")
    return said


def slices(result: Result) -> dict[tuple[str, str], list[str]]:
    """Suites by the commit and the day they were measured at, in that order."""
    found: dict[tuple[str, str], list[str]] = {}
    for suite in sorted(result.measured(), key=lambda name: result.stamp(name).started):
        stamp = result.stamp(suite)
        found.setdefault((stamp.commit, stamp.started[:10]), []).append(suite)
    return found


def stamp_table(result: Result) -> list[str]:
    """When each suite was measured, of what, and what else the machine did; nothing of a file without stamps."""
    if not result.stamps:
        return []
    lines = table_head(["suite", "began (UTC)", "commit", "rounds", "of seconds", "others", "hypervisor"])
    for suite in result.measured():
        stamp = result.stamp(suite)
        others = "" if stamp.others is None else f"{stamp.others:.1%}"
        when = stamp.started[:16].replace("T", " ")
        cells = [suite, when, stamp.commit, f"{stamp.rounds}", f"{stamp.seconds:g}", others, f"{stamp.stolen:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        "Each suite is one interleaved run, and ratios are taken within it; suites may differ in time and commit.",
        "Others: the share of the processors that went to processes not of the run, kernel threads included.",
        "", *lines, "",
    ]  # fmt: skip


def markdown(result: Result) -> str:
    """The whole report."""
    lines = [
        "# Measured",
        "",
        f"{result.started}, commit {result.commit}, {result.rounds} rounds of {result.seconds} s,",
        "interleaved; medians over the rounds, spread = interquartile range / median, ratios within a round.",
    ]
    for warning in warnings(result):
        lines += ["", f"**{warning}**"]
    lines += ["", *machine_lines(result.machine), "", *stamp_table(result)]
    verdicts = bars.judge(result)
    lines += ["## Bars", "", tally(verdicts), "", bar_table(verdicts), ""]
    suite = ""
    for point in result.points:
        if point.suite == limits.SUITE:
            continue
        if point.suite != suite:
            suite = point.suite
            lines += [f"## {suite}: {point.generator}, {point.backend}, {point.transport}", ""]
        lines += [point_table(point), ""]
    if measured := limits.tables(result.points):
        lines += ["## Limits and shares", "", *measured]
    if result.counts:
        lines += ["## Counted, per request unless the name says otherwise", "", count_table(result.counts), ""]
    if result.skipped:
        lines += ["## Left out", "", *(f"- {who}: {why}" for who, why in result.skipped.items()), ""]
    return "\n".join(lines)


def write(result: Result, source: Path) -> list[Path]:
    """Beside the JSON: NAME.md, and a folder NAME of charts."""
    text = source.with_suffix(".md")
    text.write_text(markdown(result))
    folder = source.with_suffix("")
    folder.mkdir(exist_ok=True)
    return [text, *charts.write(result, folder)]
