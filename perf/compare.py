"""Two result files: what got worse, beyond what the rounds' own spread explains.

Absolute figures of two runs on a drifting machine say little, so what is compared is each metric as a
ratio to an anchor measured in the same round: the socket ceiling or, where that takes no part, the
first rival that does, or else another form of ours. Counts are exact and are compared as they are. A point
that ours answered in the old run and failed in the new one is a regression, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perf import limits, report, stats
from perf.model import PointResult, Result
from perf.peers import CEILING, OUR_FORMS, OURS, RIVALS
from perf.stats import Metric, Summary

FLOOR = 0.05
"""Below 5 % nothing is called a change, however quiet the rounds were."""
SPREADS = 2.0
"""A change counts when it exceeds this many times the wider run's relative interquartile range."""
ROUNDS_LEAST = 3
"""Quartiles of fewer say nothing."""
METRICS: tuple[tuple[str, Metric, bool], ...] = (
    ("IOPS", stats.iops, True),
    ("CPU per request", stats.cpu_us, False),
    ("mean latency", stats.mean_us, False),
)


class CompareError(Exception):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Change:
    """One figure of two runs. `worse_by` > 0 is worse, whatever the metric's direction."""

    where: str
    what: str
    old: float
    new: float
    worse_by: float
    noise: float

    @property
    def regression(self) -> bool:
        """Worse beyond noise."""
        return self.worse_by > self.noise

    @property
    def improvement(self) -> bool:
        """Better beyond noise."""
        return -self.worse_by > self.noise


def _anchor(old: PointResult, new: PointResult, ours: str) -> str | None:
    have = {s.peer for s in old.samples} & {s.peer for s in new.samples}
    return next((peer for peer in (CEILING, *RIVALS, *OUR_FORMS) if peer in have and peer != ours), None)


def worse_by(old: float, new: float, more_is_better: bool) -> float:
    """Relative change, positive when it is for the worse."""
    change = (new - old) / old
    return -change if more_is_better else change


def noise_of(old: Summary, new: Summary) -> float:
    """What the spread of either run could explain."""
    return max(FLOOR, SPREADS * max(old.spread, new.spread))


def _form(old: PointResult, new: PointResult, ours: str) -> Iterable[Change]:
    where = f"{new.suite}/{new.point}" + ("" if ours == OURS else f" {ours}")
    if not any(sample.peer == ours for sample in new.samples):
        yield Change(where, "answered at all", 1.0, 0.0, worse_by(1.0, 0.0, True), FLOOR)
        return
    anchor = _anchor(old, new, ours)
    for name, metric, more in METRICS if anchor else ():
        assert anchor is not None
        before = stats.ratio(old.samples, ours, [anchor], metric)
        after = stats.ratio(new.samples, ours, [anchor], metric)
        if before is None or after is None or before.median == 0:
            continue
        change = worse_by(before.median, after.median, more)
        yield Change(where, f"{name} / {anchor}", before.median, after.median, change, noise_of(before, after))


def _point(old: PointResult, new: PointResult, skipped: Iterable[str]) -> Iterable[Change]:
    """Of every form of ours that the old run measured, unless the new one was not asked to."""
    asked = {sample.peer for sample in new.samples} | {failure.partition(":")[0] for failure in new.failures}
    asked |= {name.partition("/")[2] for name in skipped if name.startswith(f"{new.suite}/")}
    for ours in OUR_FORMS:
        if ours in asked and any(sample.peer == ours for sample in old.samples):
            yield from _form(old, new, ours)


def compare(old: Result, new: Result) -> list[Change]:
    """Every figure that both runs have. Raises CompareError when there is none."""
    before = {(p.suite, p.point): p for p in old.points}
    changes = [
        change
        for point in new.points
        if (point.suite, point.point) in before
        for change in _point(before[point.suite, point.point], point, new.skipped)
    ]
    was_obtained = limits.obtained(old.points)
    for name, now in limits.obtained(new.points).items():
        if name in was_obtained:
            further = abs(now - 1) - abs(was_obtained[name] - 1)
            changes.append(Change(f"{limits.SUITE}/{name}", "obtained", was_obtained[name], now, further, FLOOR))
    counted = {(c.peer, c.work, c.name): c.value for c in old.counts}
    for count in new.counts:
        was = counted.get((count.peer, count.work, count.name))
        if count.peer in OUR_FORMS and was is not None:
            change = worse_by(was, count.value, False) if was else (1.0 if count.value else 0.0)
            where = f"counts/{count.work}" + ("" if count.peer == OURS else f" {count.peer}")
            changes.append(Change(where, count.name, was, count.value, change, count.tolerance))
    if not changes:
        raise CompareError(
            f"nothing to compare: the runs share no point that {OURS} and a common peer were measured at"
        )
    return changes


def warnings(old: Result, new: Result) -> list[str]:
    """Why the comparison may mislead."""
    said = []
    if old.machine.cpu != new.machine.cpu or old.machine.kernel != new.machine.kernel:
        said.append(
            f"different machines: {old.machine.cpu}, {old.machine.kernel} / {new.machine.cpu}, {new.machine.kernel}"
        )
    for name, result in (("first", old), ("second", new)):
        if result.quick:
            said.append(f"the {name} run was --quick: too short to judge by")
        elif result.rounds < ROUNDS_LEAST:
            said.append(f"the {name} run had {result.rounds} rounds: its noise is not known")
        whole = result.model_copy(update={"quick": False})
        said += [f"the {name} run: {warning}" for warning in report.warnings(whole)]
    return said


def table(changes: Iterable[Change]) -> str:
    """Markdown, worst first."""
    lines = ["| where | ratio | old | new | change | noise | |", "| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for c in sorted(changes, key=lambda change: -change.worse_by / change.noise):
        mark = "REGRESSION" if c.regression else "better" if c.improvement else ""
        change = f"{abs(c.worse_by):.1%} {'worse' if c.worse_by > 0 else 'better'}"
        lines.append(f"| {c.where} | {c.what} | {c.old:.3g} | {c.new:.3g} | {change} | {c.noise:.1%} | {mark} |")
    return "\n".join(lines)
