"""The measured block of README.md and of docs/performance.md: written from a result file, never by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from perf import bars, limits, report, results, stats
from perf.model import PointResult, Result
from perf.peers import CEILING, OURS, QEMU_NBD, RIVALS, ROOT, STORAGE
from perf.stats import Metric

BEGIN = "<!-- measured: {source}; `python -m perf readme` writes what stands between these marks -->"
END = "<!-- measured: end -->"
_BLOCK = re.compile(r"<!-- measured: (?P<source>\S+); .*?-->\n.*?<!-- measured: end -->\n\n", re.DOTALL)
WHERE = {
    "core": "tmpfs, unix socket",
    "disk": "O_DIRECT on the real disk, unix socket",
    "tcp": "tmpfs, loopback TCP",
    "tls": "tmpfs, TLS on TCP",
}
COLUMNS = (
    "work", "IOPS", "CPU µs a request", "of the limit", "× nbdkit file", "× qemu-nbd", "× best peer",
    "× best peer per CPU-second",
)  # fmt: skip


class ReadmeError(Exception):
    """A result that the pages cannot show, or a page that has no place for it."""


@dataclass(frozen=True)
class Page:
    """A page with a measured block."""

    path: Path
    before: str
    """The heading in front of which the block goes when there is none yet."""
    body: Callable[[Result, str, str], str]
    """Of a result, its path below the tree, and the way from the page to the tree's root."""


def _times(point: PointResult, peers: tuple[str, ...], metric: Metric) -> str:
    """Ours against the best of `peers`; bold where somebody else is ahead."""
    ratio = stats.ratio(point.samples, OURS, peers, metric)
    if ratio is None:
        return ""
    return f"**{ratio.median:.2f}**" if ratio.median < 1 else f"{ratio.median:.2f}"


def _limit(point: PointResult) -> str:
    """Of the socket's ceiling, or on a disk of what fio's io_uring gets from the same file."""
    ratio = stats.ratio(point.samples, OURS, [STORAGE if point.backend == "disk" else CEILING], stats.iops)
    return f"{ratio.median:.0%}" if ratio else ""


def _row(point: PointResult) -> str:
    rate, cpu = stats.middle(point, OURS, stats.iops), stats.middle(point, OURS, stats.cpu_us)
    cells = [
        point.point, report.number(rate.median if rate else None), report.number(cpu.median if cpu else None),
        _limit(point), _times(point, ("nbdkit-file",), stats.iops), _times(point, QEMU_NBD, stats.iops),
        _times(point, RIVALS, stats.iops), _times(point, RIVALS, stats.iops_per_cpu),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _table(result: Result) -> Iterator[str]:
    yield from report.table_head(COLUMNS)
    several = len(report.slices(result)) > 1
    for suite, where in WHERE.items():
        points = [p for p in result.points if p.suite == suite and any(s.peer == OURS for s in p.samples)]
        if points:
            of = f", commit {result.stamp(suite).commit}" if several else ""
            yield f"| *{where}*{of} |" + " |" * (len(COLUMNS) - 1)
            yield from map(_row, points)


def _when(result: Result) -> str:
    slices = report.slices(result)
    if len(slices) == 1:
        ((commit, day),) = slices
        return f"{day}, commit {commit}"
    return "; ".join(f"{day}, commit {commit}: {', '.join(suites)}" for (commit, day), suites in slices.items())


def _sentence(result: Result) -> str:
    machine = result.machine
    return (
        f"{_when(result)}; on {machine.cpus} × {machine.cpu} "
        f"({machine.virtual}), {machine.memory_bytes / (1 << 30):.0f} GiB, Linux {machine.kernel}: medians of "
        f"{result.rounds} interleaved rounds, ratios within a round. One reactor; the client has the other processor."
    )


def _missed(verdicts: list[bars.Verdict]) -> Iterator[str]:
    """A line a row of the table."""
    rows: dict[str, list[str]] = {}
    for v in verdicts:
        if v.reached is False:
            rows.setdefault(v.work, []).append(f"{v.label} {report.quartiles(v.measured)}, asked {v.asked}")
    yield from (f"- {work}: {'; '.join(figures)}" for work, figures in rows.items())


def front_page(result: Result, source: str, up: str) -> str:
    """README.md's block."""
    verdicts = bars.judge(result)
    missed = list(_missed(verdicts))
    lines = ["## Measured", "", _sentence(result), *(f"**{warning}**" for warning in report.warnings(result)), ""]
    lines += [*_table(result), ""]
    lines += [
        "Limit: the socket's ceiling (a responder without storage), or fio's io_uring on the same file. Peers: nbdkit,",
        "qemu-nbd (its better mode), qemu-storage-daemon and nbd-server. Bold: another server was ahead. On the disk",
        "nbdkit has no O_DIRECT: what it reads twice comes from memory.",
        f"[How it was measured, and every bar]({up}docs/performance.md); the [samples]({up}{source}).",
        "",
        report.tally(verdicts) + (" Missed:" if missed else ""),
        "",
    ]
    return "\n".join([*lines, *missed, *([""] if missed else [])])


def bar_page(result: Result, source: str, up: str) -> str:
    """docs/performance.md's block."""
    verdicts = bars.judge(result)
    charts = up + source.removesuffix(".json")
    lines = ["## The last full run", "", _sentence(result), "", *report.machine_lines(result.machine), ""]
    lines += report.stamp_table(result)
    lines += [*(f"**{warning}**\n" for warning in report.warnings(result)), report.tally(verdicts), ""]
    lines += [report.bar_table(verdicts), ""]
    lines += [f"![IOPS and server CPU of suite core]({charts}/core.png)", ""]
    lines += [f"![IOPS per server CPU-second over connections]({charts}/scaling.png)", ""]
    lines += [f"Everything else: [the report]({charts}.md), [the samples]({up}{source}).", ""]
    if result.counts:
        lines += ["Counted, per request unless the name says otherwise:", "", report.count_table(result.counts), ""]
    if measured := limits.tables(result.points):
        lines += ["### Limits and shares, measured", "", *measured]
    return "\n".join(lines)


PAGES = (
    Page(Path("README.md"), "## More\n", front_page),
    Page(Path("docs/performance.md"), "## The suite\n", bar_page),
)


def named(text: str) -> str | None:
    """The result file that a page's block names; None: it has no block."""
    found = _BLOCK.search(text)
    return found["source"] if found else None


def render(page: Page, text: str, result: Result, source: str) -> str:
    """The page with its block made anew. Raises ReadmeError when there is no place for one."""
    up = "../" * (len(page.path.parts) - 1)
    block = "\n".join([BEGIN.format(source=source), page.body(result, source, up), END, "", ""])
    if _BLOCK.search(text):
        return _BLOCK.sub(lambda _: block, text, count=1)
    if text.count(page.before) != 1:
        raise ReadmeError(f"{page.path} has no single {page.before.strip()!r} to put the block before")
    return text.replace(page.before, block + page.before)


def write(file: Path, root: Path = ROOT) -> list[Path]:
    """Put a result into both pages. Raises ReadmeError: not of this tree, or no complete run; ResultError."""
    result = results.load(file)
    try:
        source = str(file.resolve().relative_to(root.resolve()))
    except ValueError as error:
        raise ReadmeError(f"{file} is not below {root}; the pages link to it") from error
    if not result.complete:
        raise ReadmeError(
            f"{file} is no complete run: `make perf` without --suite, --peer, --point or --quick makes one, "
            "and `--into FILE` completes one suite by suite"
        )
    for page in PAGES:
        path = root / page.path
        path.write_text(render(page, path.read_text(), result, source))
    return [root / page.path for page in PAGES]
