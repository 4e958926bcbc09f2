"""The bars: what the data plane must reach, each as a ratio within one run, and what a run says about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from perf import limits, stats
from perf.model import Count, PointResult, Result, Sample
from perf.peers import (
    CEILING,
    CEILING_DIRECT,
    CEILING_FILE,
    CEILING_RECORDS,
    NBDKIT_CACHE,
    NBDKIT_LOG,
    OURS,
    OURS_AGAIN,
    OURS_CACHE,
    OURS_HALF,
    OURS_LOG,
    OURS_LOG_FULL,
    OURS_MILLION_RUNS,
    OURS_MIRROR,
    OURS_NULL,
    OURS_ONE_RUN,
    OURS_SLOW,
    OURS_TWO,
    QEMU_LOG,
    QEMU_NBD,
    QUORUM,
    RIVALS,
    STORAGE,
)
from perf.stats import Metric, Summary
from perf.suites import RESYNC

Relation = Literal[">=", "<="]
Against = Literal["best", "sum"]


@dataclass(frozen=True)
class Bar:
    """`metric` of a server of ours, over that of others in the same round, must keep to a factor."""

    work: str
    """The row of the table that asks for it."""
    label: str
    suite: str
    point: str
    metric: Metric
    against: tuple[str, ...]
    relation: Relation
    factor: float | None
    """None: it is published and has no bar."""
    combine: Against = "best"
    """Of several others: the best one, or all of them added."""
    ours: str = OURS
    against_point: str = ""
    """Where the others are measured, if that is another point of the suite."""
    within_noise: bool = False
    """It is missed only if the rounds' whole middle half lies beyond: for what is to be no worse than the other."""


@dataclass(frozen=True)
class CountBar:
    """A counted figure must keep to a limit, or to a factor of another server's figure."""

    work: str
    label: str
    peer: str
    load: str
    name: str
    relation: Relation
    factor: float
    against: str = ""
    """Whose figure of the same load and name it is divided by; without it, the figure is judged as it is."""
    unit: float = 1.0
    """What one of the bar's units is, in units of the count."""


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured."""

    work: str
    label: str
    asked: str
    measured: Summary | None
    """None: not measured."""
    reached: bool | None
    """None: not measured, or nothing was asked."""


def _ratios(
    work: str, suite: str, point: str, *wishes: tuple[str, Metric, tuple[str, ...], Relation, float]
) -> list[Bar]:
    return [
        Bar(work, label, suite, point, metric, against, relation, f) for label, metric, against, relation, f in wishes
    ]


_C, _NBDKIT, _STORAGE = (CEILING,), ("nbdkit-file",), (STORAGE,)
_IOPS, _CPU, _PER_CPU, _MEAN, _P99 = stats.iops, stats.cpu_us, stats.iops_per_cpu, stats.mean_us, stats.p99_us
_CEILING = "IOPS / socket ceiling"
_KIT = "IOPS / nbdkit file"
_KIT_CPU = "IOPS per CPU-second / nbdkit file"
_QEMU = "IOPS / qemu-nbd's better mode"
_BEST_CPU = "IOPS per CPU-second / best peer"
_READ, _READ_DEEP, _WRITE = (
    "4 KiB random read, depth 32",
    "4 KiB random read, depth 256",
    "4 KiB random write, depth 32",
)
_SEQ_READ, _SEQ_WRITE = "256 KiB sequential read, depth 8", "256 KiB sequential write, depth 8"
_ONE, _COST = "4 KiB random read, depth 1", "server CPU per 4 KiB request, depth 32"
_MIRROR_WRITE = "a mirror of 2 legs, 4 KiB random write, depth 32"
_MIRROR_READ = "a mirror of 2 legs, 4 KiB random read, depth 32"
_RESYNC = "resync of a whole leg"
_DISK, _TLS = "O_DIRECT on the real disk", "TLS on TCP, per core"


def _large(suite: str, where: str) -> Iterator[Bar]:
    """Large blocks against the best peer, and how far the socket's ceiling is ahead of it: no server gets further."""
    for work, point in ((_SEQ_READ, "seqread-256k-qd8"), (_SEQ_WRITE, "seqwrite-256k-qd8")):
        yield Bar(work + where, _BEST_CPU, suite, point, _PER_CPU, RIVALS, ">=", 1.5)
        yield Bar(
            work + where, "the same of the socket ceiling, without storage", suite, point, _PER_CPU, RIVALS, ">=", None,
            ours=CEILING,
        )  # fmt: skip


def _responder_bars(suite: str, where: str) -> Iterator[Bar]:
    """Large blocks beside the ceiling's responder with the file: what a server must do that stores what it is given."""
    for work, kind, does in ((_SEQ_READ, "read", "reading"), (_SEQ_WRITE, "write", "storing in")):
        label = f"IOPS per CPU-second / the same responder {does} the file"
        yield Bar(work + where, label, suite, f"seq{kind}-256k-qd8", _PER_CPU, (CEILING_FILE,), ">=", None)


def _against_peers(suite: str, where: str) -> list[Bar]:
    """The bars that compare with other servers: the same ones on every transport without TLS."""
    costs = [
        bar
        for kind in ("read", "write")
        for bar in _ratios(
            _COST + where, suite, f"rand{kind}-4k-qd32",
            (f"{kind}: CPU / nbdkit file", _CPU, _NBDKIT, "<=", 1 / 3),
            (f"{kind}: CPU / qemu-nbd's better mode", _CPU, QEMU_NBD, "<=", 0.1),
        )
    ]  # fmt: skip
    return [
        *_ratios(
            _READ + where, suite, "randread-4k-qd32",
            (_KIT, _IOPS, _NBDKIT, ">=", 3), (_QEMU, _IOPS, QEMU_NBD, ">=", 8),
        ),
        *_ratios(_READ_DEEP + where, suite, "randread-4k-qd256", (_KIT, _IOPS, _NBDKIT, ">=", 4)),
        *_ratios(
            _WRITE + where, suite, "randwrite-4k-qd32",
            (_KIT, _IOPS, _NBDKIT, ">=", 1), (_KIT_CPU, _PER_CPU, _NBDKIT, ">=", 1.5),
            (_QEMU, _IOPS, QEMU_NBD, ">=", 5),
        ),
        *_large(suite, where),
        *_ratios(
            _ONE + where, suite, "randread-4k-qd1",
            ("mean latency / best peer", _MEAN, RIVALS, "<=", 0.75), ("p99 latency / best peer", _P99, RIVALS, "<=", 1),
        ),
        *costs,
    ]  # fmt: skip


def _mirror_bars(suite: str, where: str) -> Iterator[Bar]:
    """A mirror of two legs beside one leg, beside QEMU's, and beside itself while it copies a leg."""
    for kind, work, factor in (("write", _MIRROR_WRITE, 0.55), ("read", _MIRROR_READ, 1.0)):
        point = f"rand{kind}-4k-qd32"
        yield Bar(
            work + where, "IOPS / one leg", suite, point, _IOPS, (OURS,), ">=", factor, ours=OURS_MIRROR,
            within_noise=kind == "read",
        )  # fmt: skip
        yield Bar(
            work + where, "IOPS / QEMU's quorum", suite, point, _IOPS, (QUORUM,), ">=",
            5 if kind == "write" and not where else None, ours=OURS_MIRROR,
        )  # fmt: skip
    yield Bar(
        _RESYNC + where, "bytes / fio reading one leg and writing the other", suite, RESYNC, _IOPS, _STORAGE, ">=", 0.8,
        ours=OURS_MIRROR,
    )  # fmt: skip
    for kind in ("read", "write"):
        point = f"rand{kind}-4k-qd32"
        yield Bar(
            _RESYNC + where, f"4 KiB random {kind}s meanwhile, depth 32: p99 / without", suite, f"{point}-resync", _P99,
            (OURS_MIRROR,), "<=", 2.0, ours=OURS_MIRROR, against_point=point,
        )  # fmt: skip


def _cache_bars() -> Iterator[Bar]:
    """Hits beside no storage at all, and a cache that half of the working set fits into beside none."""
    hits, half = "reads that hit the cache, 4 KiB, depth 32", "a working set twice the cache's RAM"
    point = "randread-4k-qd32"
    yield Bar(hits, "IOPS / without storage", "cache", point, _IOPS, (OURS_NULL,), ">=", 0.9, ours=OURS_CACHE)
    kit = "IOPS / nbdkit's cache filter"
    yield Bar(hits, kit, "cache", point, _IOPS, (NBDKIT_CACHE,), ">=", None, ours=OURS_CACHE)
    for work in (point, "randrw-4k-qd32", "randwrite-4k-qd32", "seqread-256k-qd8"):
        yield Bar(half, f"{work}: IOPS / no cache", "cache", work, _IOPS, (OURS,), ">=", 0.95, ours=OURS_HALF)
        yield Bar(half, "the same of no cache once more", "cache", work, _IOPS, (OURS,), ">=", None, ours=OURS_AGAIN)


def _log_bars() -> Iterator[Bar]:
    """The write-back log over storage that takes 2 ms more, beside the same without one, and beside a bare log."""
    for depth, factor in ((1, 10), (16, 5)):
        work, point = f"write-back log, slow storage, 4 KiB random write, depth {depth}", f"randwrite-4k-qd{depth}"
        yield Bar(work, "IOPS / write-through", "writeback", point, _IOPS, (OURS_SLOW,), ">=", factor, ours=OURS_LOG)
        own = "IOPS / the log device's own, in records as large"
        yield Bar(work, own, "writeback", point, _IOPS, _STORAGE, ">=", 0.7, ours=OURS_LOG)
        alone = "a responder that only writes such records"
        yield Bar(work, f"IOPS / {alone}", "writeback", point, _IOPS, (CEILING_RECORDS,), ">=", None, ours=OURS_LOG)
        yield Bar(
            work, f"{alone}: IOPS / the log device's own", "writeback", point, _IOPS, _STORAGE, ">=", None,
            ours=CEILING_RECORDS,
        )  # fmt: skip
        for label, other in (("nbdkit's cache filter, write-back", NBDKIT_LOG), ("qemu-nbd, write-back", QEMU_LOG)):
            yield Bar(work, f"IOPS / {label}", "writeback", point, _IOPS, (other,), ">=", None, ours=OURS_LOG)
    work = "write-back log that is full, 4 KiB random write, depth 16"
    point = "sustained-4k-qd16"
    yield Bar(work, "IOPS / no log", "writeback", point, _IOPS, (OURS_SLOW,), ">=", 0.9, ours=OURS_LOG_FULL)


def _hot_bars() -> Iterator[Bar]:
    """Reads of a file that a processor's cache holds: how near the ceiling is when nobody waits for main memory."""
    for work, point in (
        (_READ, "randread-4k-qd32"),
        (_READ_DEEP, "randread-4k-qd256"),
        (_SEQ_READ, "seqread-256k-qd8"),
    ):
        for label, metric in (("IOPS", _IOPS), ("IOPS per CPU-second", _PER_CPU)):
            yield Bar(work, f"of a file of 1 MiB: {label} / socket ceiling", "hot", point, metric, _C, ">=", None)


def _bulk_bars() -> Iterator[Bar]:
    """Large blocks for a processor-second while no server spins: then the ceiling's figure is what the socket costs."""
    for suite, where in (("bulk", ""), ("bulk-tcp", ", TCP")):
        for work, point in ((_SEQ_READ, "seqread-256k-qd8"), (_SEQ_WRITE, "seqwrite-256k-qd8")):
            for ours, label in (
                (OURS, _BEST_CPU),
                (CEILING, "the same of the socket ceiling"),
                (CEILING_FILE, "the same of the ceiling's responder with the file"),
            ):
                yield Bar(
                    work + where, f"no server spins: {label}", suite, point, _PER_CPU, RIVALS, ">=", None, ours=ours
                )


def _disk_bars() -> Iterator[Bar]:
    """fio on the same file, without any client, and the ceiling's responder on one: how far any server gets."""
    responder, part = (CEILING_DIRECT,), "the ceiling's responder on the file"
    for label, point in (
        ("read, depth 32", "randread-4k-qd32"),
        ("read, depth 128", "randread-4k-qd128"),
        ("write, depth 32", "randwrite-4k-qd32"),
    ):
        yield Bar(_DISK, f"{label}: IOPS / fio io_uring", "disk", point, _IOPS, _STORAGE, ">=", 0.95)
        yield Bar(_DISK, f"{label}: IOPS / {part}", "disk", point, _IOPS, responder, ">=", None)
        yield Bar(
            _DISK, f"{label}: {part}, IOPS / fio io_uring", "disk", point, _IOPS, _STORAGE, ">=", None,
            ours=CEILING_DIRECT,
        )  # fmt: skip
    one, both = "randread-4k-qd1", (STORAGE, CEILING)
    beside = "(fio's + the socket ceiling's)"
    yield Bar(_DISK, f"read, depth 1: latency / {beside}", "disk", one, _MEAN, both, "<=", 1.1, "sum")
    yield Bar(_DISK, f"read, depth 1: latency / {part}", "disk", one, _MEAN, responder, "<=", None)
    yield Bar(
        _DISK, f"read, depth 1: {part}, latency / {beside}", "disk", one, _MEAN, both, "<=", None, "sum",
        ours=CEILING_DIRECT,
    )  # fmt: skip


BARS: tuple[Bar, ...] = (
    *_ratios(_READ, "core", "randread-4k-qd32", (_CEILING, _IOPS, _C, ">=", 0.85)),
    *_ratios(_READ_DEEP, "core", "randread-4k-qd256", (_CEILING, _IOPS, _C, ">=", 0.70)),
    *_ratios(_WRITE, "core", "randwrite-4k-qd32", (_CEILING, _IOPS, _C, ">=", 0.55)),
    *_ratios(_SEQ_READ, "core", "seqread-256k-qd8", (_CEILING, _IOPS, _C, ">=", 0.75)),
    *_ratios(_SEQ_WRITE, "core", "seqwrite-256k-qd8", (_CEILING, _IOPS, _C, ">=", 0.60)),
    *_against_peers("core", ""),
    *(
        Bar(work, "IOPS / the same responder reading the file", "memory", point, _IOPS, (CEILING_FILE,), ">=", None)
        for work, point in (
            (_READ, "randread-4k-qd32"), (_READ_DEEP, "randread-4k-qd256"), (_SEQ_READ, "seqread-256k-qd8"),
        )
    ),
    *_responder_bars("memory", ""),
    *_disk_bars(),
    *(
        Bar(
            "4 connections on 2 reactors against 1 on 1", f"{kind}: IOPS per CPU-second", "scaling",
            f"rand{kind}-4k-4x32", _PER_CPU, (OURS,), ">=", 1.0, ours=OURS_TWO, against_point=f"rand{kind}-4k-1x32",
        )
        for kind in ("read", "write")
    ),
    Bar(
        "a map of 1,000,000 runs, random order", "wall clock: IOPS / one region, depth 32", "map", "randread-4k-qd32",
        _IOPS, (OURS_ONE_RUN,), ">=", None, ours=OURS_MILLION_RUNS,
    ),
    *_against_peers("tcp", ", TCP"),
    *_responder_bars("memory-tcp", ", TCP"),
    *(
        Bar(_TLS, f"{point}: IOPS per CPU-second / best peer", "tls", point, _PER_CPU, RIVALS, ">=", 1.0)
        for point in ("randread-4k-qd32", "randwrite-4k-qd32", "seqread-256k-qd8", "seqwrite-256k-qd8")
    ),
    *_mirror_bars("mirror", ""),
    *_mirror_bars("mirror-disk", ", O_DIRECT on the real disk"),
)  # fmt: skip
OWN_BARS: tuple[Bar, ...] = (*_hot_bars(), *_bulk_bars(), *_cache_bars(), *_log_bars())
"""Of suites that are run by themselves: judged where a run has them."""

IDLE_EXPORTS = 1000
IDLE_LOAD = f"{IDLE_EXPORTS:,} bound exports, one idle connection each"
MAP_LOAD = "read-4k-qd32"
MIRROR_LOAD = "mirror-4k-qd15, simulated port"
PROCESSORS, RESIDENT, INSTRUCTIONS = "processors", "resident bytes a connection", "instructions"
INTENT = "intent check, of the instructions"

COUNT_BARS: tuple[CountBar, ...] = (
    CountBar(
        "a map of 1,000,000 runs, random order", "instructions per request / one region", OURS_MILLION_RUNS, MAP_LOAD,
        INSTRUCTIONS, "<=", 1.03, OURS_ONE_RUN,
    ),
    CountBar(
        _MIRROR_WRITE, "a warm region's intent check, % of the instructions", OURS, MIRROR_LOAD, INTENT, "<=", 3.0,
        unit=0.01,
    ),
    CountBar(IDLE_LOAD, "CPU of all processes, % of one", OURS, IDLE_LOAD, PROCESSORS, "<=", 0.5, unit=0.01),
    CountBar(IDLE_LOAD, "resident KiB per connection", OURS, IDLE_LOAD, RESIDENT, "<=", 64, unit=1024),
)  # fmt: skip
"""The rows of the table that are counted, or watched, rather than measured in rounds."""


def _asked(relation: Relation, factor: float | None, within_noise: bool = False) -> str:
    if factor is None:
        return "published"
    return f"{'≥' if relation == '>=' else '≤'} {factor:.3g}" + (", within noise" if within_noise else "")


def _reached(
    relation: Relation, factor: float | None, measured: Summary | None, within_noise: bool = False
) -> bool | None:
    if factor is None or measured is None:
        return None
    if relation == ">=":
        return (measured.high if within_noise else measured.median) >= factor
    return (measured.low if within_noise else measured.median) <= factor


def _ratio(bar: Bar, measured: dict[tuple[str, str], PointResult]) -> Summary | None:
    def samples(point: str) -> Sequence[Sample]:
        found = measured.get((bar.suite, point))
        return found.samples if found else ()

    best = "min" if bar.relation == "<=" else "max"
    others = stats.by_round(samples(bar.against_point or bar.point), bar.against, bar.metric, best)
    if bar.combine == "sum":
        others = stats.summed(samples(bar.point), bar.against, bar.metric)
    return stats.paired(stats.by_round(samples(bar.point), [bar.ours], bar.metric), others)


def _counted(bar: CountBar, counts: dict[tuple[str, str, str], float]) -> Summary | None:
    value = counts.get((bar.peer, bar.load, bar.name))
    other = counts.get((bar.against, bar.load, bar.name)) if bar.against else bar.unit
    return stats.summarise([value / other]) if value is not None and other else None


def _limit_figures(points: Sequence[PointResult]) -> Iterator[tuple[str, str, Relation, float | None, float]]:
    """Limits and shares: the row, the label, the bar and the figure."""
    cases, parts, length = limits.cases(points), limits.parts(points), f"{limits.seconds(points):g} s"
    if cases:
        row = f"limits of a VVol, {len(cases)} loads of {length}"
        through = [case.obtained for case in cases]
        yield row, "obtained / asked, the least", ">=", 0.95, min(through)
        yield row, "obtained / asked, the most", "<=", 1.05, max(through)
        for depth in sorted({case.depth for case in cases}):
            waited = max(case.waited for case in cases if case.depth == depth)
            yield (
                row,
                f"p99.9 latency / its bound, depth {depth}, the longest",
                "<=",
                1.0 if depth > 1 else None,
                waited,
            )
    for part in parts:
        row = f"shares of {len(parts)} VVols that keep one reactor busy, {length}"
        yield row, f"{part.shares} of {part.of}: obtained / its part", ">=", 0.95, part.obtained


def _verdicts(points: Sequence[PointResult], counts: Sequence[Count]) -> Iterator[Verdict]:
    measured = {(p.suite, p.point): p for p in points}
    counted = {(c.peer, c.work, c.name): c.value for c in counts}
    run = {point.suite for point in points}
    for bar in (*BARS, *(bar for bar in OWN_BARS if bar.suite in run)):
        ratio = _ratio(bar, measured)
        yield Verdict(
            bar.work, bar.label, _asked(bar.relation, bar.factor, bar.within_noise), ratio,
            _reached(bar.relation, bar.factor, ratio, bar.within_noise),
        )  # fmt: skip
    for row, label, relation, factor, figure in _limit_figures(points):
        found = stats.summarise([figure])
        yield Verdict(row, label, _asked(relation, factor), found, _reached(relation, factor, found))
    for count in COUNT_BARS:
        value = _counted(count, counted)
        yield Verdict(
            count.work, count.label, _asked(count.relation, count.factor), value,
            _reached(count.relation, count.factor, value),
        )  # fmt: skip


def judge(result: Result) -> list[Verdict]:
    """Every bar, measured or not, those of one row of the table together."""
    rows: dict[str, list[Verdict]] = {}
    for verdict in _verdicts(result.points, result.counts):
        rows.setdefault(verdict.work, []).append(verdict)
    return [verdict for row in rows.values() for verdict in row]
