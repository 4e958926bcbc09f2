"""The bars: what the data plane must reach, each as a ratio within one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perf import stats
from perf.model import PointResult
from perf.peers import CEILING, OURS, QEMU_NBD, RIVALS, STORAGE
from perf.stats import Metric, Summary


@dataclass(frozen=True)
class Bar:
    """`metric` of ours against the best of `against` must be at least, or at most, `factor`."""

    suite: str
    point: str
    label: str
    metric: Metric
    against: tuple[str, ...]
    relation: Literal[">=", "<="]
    factor: float


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured; `ratio` is None where a needed peer is missing."""

    bar: Bar
    ratio: Summary | None

    @property
    def reached(self) -> bool | None:
        """None: not measured."""
        if self.ratio is None:
            return None
        at_least = self.bar.relation == ">="
        return self.ratio.median >= self.bar.factor if at_least else self.ratio.median <= self.bar.factor


_C, _NBDKIT, _STORAGE = (CEILING,), ("nbdkit-file",), (STORAGE,)
_IOPS, _CPU, _PER_CPU, _MEAN, _P99 = stats.iops, stats.cpu_us, stats.iops_per_cpu, stats.mean_us, stats.p99_us

BARS: tuple[Bar, ...] = (
    Bar("core", "randread-4k-qd32", "IOPS / socket ceiling", _IOPS, _C, ">=", 0.85),
    Bar("core", "randread-4k-qd32", "IOPS / nbdkit file", _IOPS, _NBDKIT, ">=", 3.0),
    Bar("core", "randread-4k-qd32", "IOPS / qemu-nbd's better mode", _IOPS, QEMU_NBD, ">=", 8.0),
    Bar("core", "randread-4k-qd32", "CPU per request / nbdkit file", _CPU, _NBDKIT, "<=", 1 / 3),
    Bar("core", "randread-4k-qd32", "CPU per request / qemu-nbd's better mode", _CPU, QEMU_NBD, "<=", 0.1),
    Bar("core", "randread-4k-qd256", "IOPS / socket ceiling", _IOPS, _C, ">=", 0.70),
    Bar("core", "randread-4k-qd256", "IOPS / nbdkit file", _IOPS, _NBDKIT, ">=", 4.0),
    Bar("core", "randwrite-4k-qd32", "IOPS / socket ceiling", _IOPS, _C, ">=", 0.55),
    Bar("core", "randwrite-4k-qd32", "IOPS / nbdkit file", _IOPS, _NBDKIT, ">=", 1.0),
    Bar("core", "randwrite-4k-qd32", "IOPS per CPU-second / nbdkit file", _PER_CPU, _NBDKIT, ">=", 1.5),
    Bar("core", "randwrite-4k-qd32", "IOPS / qemu-nbd's better mode", _IOPS, QEMU_NBD, ">=", 5.0),
    Bar("core", "seqread-256k-qd8", "IOPS / socket ceiling", _IOPS, _C, ">=", 0.75),
    Bar("core", "seqread-256k-qd8", "IOPS per CPU-second / best peer", _PER_CPU, RIVALS, ">=", 1.5),
    Bar("core", "seqwrite-256k-qd8", "IOPS / socket ceiling", _IOPS, _C, ">=", 0.60),
    Bar("core", "seqwrite-256k-qd8", "IOPS per CPU-second / best peer", _PER_CPU, RIVALS, ">=", 1.5),
    Bar("core", "randread-4k-qd1", "mean latency / best peer", _MEAN, RIVALS, "<=", 0.75),
    Bar("core", "randread-4k-qd1", "p99 latency / best peer", _P99, RIVALS, "<=", 1.0),
    Bar("disk", "randread-4k-qd32", "IOPS / fio io_uring on the file", _IOPS, _STORAGE, ">=", 0.95),
    Bar("disk", "randread-4k-qd128", "IOPS / fio io_uring on the file", _IOPS, _STORAGE, ">=", 0.95),
    Bar("disk", "randwrite-4k-qd32", "IOPS / fio io_uring on the file", _IOPS, _STORAGE, ">=", 0.95),
    Bar("tcp", "randread-4k-qd32", "IOPS / nbdkit file", _IOPS, _NBDKIT, ">=", 3.0),
    Bar("tcp", "randread-4k-qd32", "IOPS / qemu-nbd's better mode", _IOPS, QEMU_NBD, ">=", 8.0),
    Bar("tcp", "randread-4k-qd256", "IOPS / nbdkit file", _IOPS, _NBDKIT, ">=", 4.0),
    Bar("tcp", "randwrite-4k-qd32", "IOPS / nbdkit file", _IOPS, _NBDKIT, ">=", 1.0),
    Bar("tcp", "randwrite-4k-qd32", "IOPS / qemu-nbd's better mode", _IOPS, QEMU_NBD, ">=", 5.0),
    Bar("tls", "randread-4k-qd32", "IOPS per CPU-second / best peer", _PER_CPU, RIVALS, ">=", 1.0),
    Bar("tls", "randwrite-4k-qd32", "IOPS per CPU-second / best peer", _PER_CPU, RIVALS, ">=", 1.0),
)
"""Issue 3's table, as far as rounds of one point can answer it; scaling, idle cost and counts stand apart."""


def judge(points: Sequence[PointResult]) -> list[Verdict]:
    """Every bar whose point was measured."""
    measured = {(p.suite, p.point): p for p in points}
    verdicts = []
    for bar in BARS:
        result = measured.get((bar.suite, bar.point))
        if result is not None:
            best = "min" if bar.relation == "<=" else "max"
            verdicts.append(Verdict(bar, stats.ratio(result.samples, OURS, bar.against, bar.metric, best)))
    return verdicts
