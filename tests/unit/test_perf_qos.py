"""The experiment on limits: its arithmetic and its page. (What it measures is judged in simulated time: tests/sim.)"""

from __future__ import annotations

import pytest

from perf import qos
from perf.model import Count, Latency, Machine, PointResult, Result, Sample
from perf.peers import OURS


@pytest.mark.parametrize(
    ("limit", "depth", "connections", "seconds"),
    [("iops-2000", 1, 1, 0.0007), ("iops-2000", 32, 4, 0.0704), ("bandwidth-64MiB", 32, 1, 0.03765)],
)
def test_the_bound_is_the_documented_one(limit: str, depth: int, connections: int, seconds: float) -> None:
    (found,) = [one for one in qos.LIMITS if one.name == limit]
    assert qos.bound_s(found, depth, connections) == pytest.approx(seconds)


def test_a_page_has_a_row_for_each_case() -> None:
    latency = Latency(mean_us=1000, p50_us=1500, p90_us=2000, p99_us=3000, p999_us=4000, max_us=5000)
    sample = Sample(peer=OURS, round=0, requests=20010, iops=2001, latency=latency)
    names = ("iops-2000-d1-c1-r1", "shares-300-of-400")
    points = tuple(
        PointResult(
            suite="qos", point=name, generator="loadgen", backend="tmpfs", transport="unix", spec={}, samples=(sample,)
        )
        for name in names
    )
    counts = (
        Count(peer=OURS, work=names[0], name=qos.ACHIEVED, value=1.0005, tolerance=0.05),
        Count(peer=OURS, work=names[0], name=qos.LONG, value=0.5, tolerance=1.0),
        Count(peer=OURS, work=names[1], name=qos.SHARE, value=0.99, tolerance=0.2),
    )
    machine = Machine(
        cpu="a",
        cpus=2,
        memory_bytes=1 << 30,
        kernel="6.1",
        mitigations="",
        governor="",
        virtual="",
        disk="",
        versions={},
    )
    result = Result(
        started="now", commit="c", complete=False, quick=False, rounds=1, seconds=10, load_before=0, stolen=0,
        machine=machine, points=points, counts=counts,
    )  # fmt: skip
    page = qos.markdown(result)
    assert "| iops-2000-d1-c1-r1 | 2,001 | 1.0005 |  | 1.50 | 4.00 | 0.50 |" in page
    assert "| shares-300-of-400 | 2,001 |  | 0.9900 | 1.50 | 4.00 |  |" in page
