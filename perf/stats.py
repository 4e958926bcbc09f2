"""Statistics for noisy machines: medians, spread, and ratios paired within a round.

A small virtual machine drifts up to fivefold within minutes, but a round (A B C in a row) takes
seconds: a ratio of two samples of the same round survives what an absolute figure does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from perf.model import PointResult, Sample
from perf.peers import OUR_FORMS

Metric = Callable[[Sample], float | None]


def iops(sample: Sample) -> float | None:
    """Requests answered per second."""
    return sample.iops


def cpu_us(sample: Sample) -> float | None:
    """Server CPU microseconds per request."""
    return sample.server_cpu_us


def iops_per_cpu(sample: Sample) -> float | None:
    """Requests per second of server CPU."""
    return 1e6 / sample.server_cpu_us if sample.server_cpu_us else None


def mean_us(sample: Sample) -> float | None:
    """Mean latency, microseconds."""
    return sample.latency.mean_us


def p50_us(sample: Sample) -> float | None:
    """Median latency, microseconds."""
    return sample.latency.p50_us


def p90_us(sample: Sample) -> float | None:
    """90th percentile of latency, microseconds."""
    return sample.latency.p90_us


def p99_us(sample: Sample) -> float | None:
    """99th percentile of latency, microseconds."""
    return sample.latency.p99_us


def p999_us(sample: Sample) -> float | None:
    """99.9th percentile of latency, microseconds."""
    return sample.latency.p999_us


def rss_bytes(sample: Sample) -> float | None:
    """Resident memory of the server's processes, shared pages included, bytes."""
    return sample.rss_bytes


def rss_anon_bytes(sample: Sample) -> float | None:
    """Resident memory that is the server's own, bytes."""
    return sample.rss_anon_bytes


@dataclass(frozen=True)
class Summary:
    """The middle of some values and how far they spread."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    count: int

    @property
    def spread(self) -> float:
        """Interquartile range relative to the median: 0.1 means the middle half lies within 10 %."""
        return (self.high - self.low) / self.median if self.median else 0.0


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks of sorted values."""
    if not ordered:
        raise ValueError("no values")
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarise(values: Iterable[float]) -> Summary | None:
    """None when there is nothing to summarise."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Summary(median(ordered), quantile(ordered, 0.25), quantile(ordered, 0.75), len(ordered))


def by_round(samples: Iterable[Sample], peers: Iterable[str], metric: Metric, best: str = "max") -> dict[int, float]:
    """Per round the metric of a peer; of several peers the best one of that round ("max" or "min")."""
    wanted = set(peers)
    rounds: dict[int, float] = {}
    pick = {"max": max, "min": min}[best]
    for sample in samples:
        value = metric(sample)
        if sample.peer in wanted and value is not None:
            rounds[sample.round] = pick(rounds[sample.round], value) if sample.round in rounds else value
    return rounds


def summed(samples: Iterable[Sample], peers: Sequence[str], metric: Metric) -> dict[int, float]:
    """Per round the metric of several peers added up; only rounds that all of them have."""
    rounds: dict[int, dict[str, float]] = {}
    for sample in samples:
        value = metric(sample)
        if sample.peer in peers and value is not None:
            rounds.setdefault(sample.round, {})[sample.peer] = value
    return {turn: sum(values.values()) for turn, values in rounds.items() if len(values) == len(set(peers))}


def paired(above: Mapping[int, float], below: Mapping[int, float]) -> Summary | None:
    """Ratios above / below of the rounds that both have."""
    return summarise(above[r] / below[r] for r in above.keys() & below.keys() if below[r] > 0)


def ratio(
    samples: Sequence[Sample], peer: str, others: Iterable[str], metric: Metric, best: str = "max"
) -> Summary | None:
    """`peer` against the best of `others`, round by round."""
    return paired(by_round(samples, [peer], metric, best), by_round(samples, others, metric, best))


def peers_of(point: PointResult) -> list[str]:
    """In the order they first ran, ours first."""
    seen = dict.fromkeys(sample.peer for sample in point.samples)
    return sorted(seen, key=lambda peer: peer not in OUR_FORMS)


def middle(point: PointResult, peer: str, metric: Metric) -> Summary | None:
    """Of a server's samples at a point."""
    values = [metric(sample) for sample in point.samples if sample.peer == peer]
    return summarise(value for value in values if value is not None)
