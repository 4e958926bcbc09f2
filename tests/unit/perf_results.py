"""Result files out of thin air, for the tests of perf/."""

from __future__ import annotations

from perf.model import Count, Latency, Machine, PointResult, Result, Sample, Stamp


def sample(peer: str, turn: int, iops: float, cpu_us: float | None = 2.0, mean_us: float = 50.0) -> Sample:
    latency = Latency(
        mean_us=mean_us, p50_us=mean_us, p90_us=mean_us, p99_us=2 * mean_us, p999_us=3 * mean_us, max_us=9 * mean_us
    )
    return Sample(
        peer=peer, round=turn, requests=int(iops), iops=iops, latency=latency,
        server_cpu_us=cpu_us, rss_anon_bytes=1 << 20,
    )  # fmt: skip


def point(
    samples: list[Sample], name: str = "randread-4k-qd32", suite: str = "core", failures: tuple[str, ...] = ()
) -> PointResult:
    return PointResult(
        suite=suite, point=name, generator="loadgen", backend="tmpfs", transport="unix", spec={"depth": "32"},
        samples=tuple(samples), failures=failures,
    )  # fmt: skip


def steady(name: str, suite: str, rates: dict[str, float], rounds: int = 3) -> PointResult:
    """A point whose servers keep their rates; CPU per request is 1 s over the rate."""
    samples = [sample(peer, turn, rate, 1e6 / rate) for turn in range(rounds) for peer, rate in rates.items()]
    return point(samples, name, suite)


def result(points: list[PointResult], counts: tuple[Count, ...] = (), load: float = 0.0) -> Result:
    machine = Machine(
        cpu="one", cpus=2, memory_bytes=1 << 30, kernel="6", mitigations="", governor="", virtual="kvm", disk="",
        versions={"fio": "fio-3.33"},
    )  # fmt: skip
    return Result(
        started="2026-01-01T00:00:00+00:00", commit="abc", complete=True, quick=False, rounds=5, seconds=1.0,
        load_before=load, stolen=0.0, machine=machine, points=tuple(points), counts=counts,
    )  # fmt: skip


def stamp(commit: str, minute: int, others: float | None = 0.0, load: float = 0.0) -> Stamp:
    """Of a suite that began that many minutes past noon."""
    return Stamp(
        started=f"2026-01-01T12:{minute:02}:00+00:00", commit=commit, rounds=5, seconds=1.0, load_before=load,
        stolen=0.0, others=others,
    )  # fmt: skip
