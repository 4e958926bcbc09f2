"""What a run yields: the result file's model. Ratios are computed from it, never stored in it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FORMAT: Literal[2] = 2

Backend = Literal["tmpfs", "disk", "null"]
Transport = Literal["unix", "tcp", "tls"]
Generator = Literal["loadgen", "fio"]


class Strict(BaseModel):
    """Unknown keys are an error: a misspelt option must not silently measure something else."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Latency(Strict):
    """Of one sample, all operations together, microseconds."""

    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float


class Sample(Strict):
    """One peer, one point, one round."""

    peer: str
    round: int
    requests: int
    iops: float
    latency: Latency
    server_cpu_us: float | None = None
    """Server CPU time (user + system, every thread and child) per request; None: there is no server."""
    client_cpu_us: float | None = None
    rss_bytes: int | None = None
    rss_anon_bytes: int | None = None
    threads: int | None = None
    switches_per_request: float | None = None


class PointResult(Strict):
    """All samples of one point of one suite."""

    suite: str
    point: str
    generator: Generator
    backend: Backend
    transport: Transport
    spec: dict[str, str]
    samples: tuple[Sample, ...]
    failures: tuple[str, ...] = ()


class Machine(Strict):
    """Where it ran: figures of two machines are never compared as such."""

    cpu: str
    cpus: int
    memory_bytes: int
    kernel: str
    mitigations: str
    governor: str
    virtual: str
    disk: str
    versions: dict[str, str]


class Count(Strict):
    """A figure that is counted and not timed: hardly any noise touches it."""

    peer: str
    work: str
    name: str
    value: float
    tolerance: float
    """How far two runs of the same code may differ, relative: 0.01 for instructions, more where timing has a say."""


class Stamp(Strict):
    """When a suite was measured, of what, and on how quiet a machine."""

    started: str
    commit: str
    rounds: int
    seconds: float
    load_before: float
    """As in `Result`."""
    stolen: float
    others: float | None = None
    """Share of the processors that went to processes which were none of the run's; None: nobody looked."""


COUNTS = "counts"
"""What is counted has a stamp under this name."""


class Result(Strict):
    """One run of the suite, or suites of several runs, each of which is whole."""

    format: Literal[2] = FORMAT
    started: str
    commit: str
    complete: bool
    """Every suite, server and point there is, at full length: what the README may show."""
    quick: bool
    rounds: int
    seconds: float
    load_before: float
    """One-minute load average before the run: above ~0.2 somebody else was measured too."""
    stolen: float
    """Share of the processors that the hypervisor gave to others during the run."""
    machine: Machine
    points: tuple[PointResult, ...]
    counts: tuple[Count, ...] = ()
    skipped: dict[str, str] = {}
    """Peers that could not run, and why."""
    stamps: dict[str, Stamp] = {}
    """By suite, where a suite has one of its own. What stands above is then the latest run's."""

    def stamp(self, suite: str) -> Stamp:
        """Of a suite, or of what is counted."""
        whole = Stamp(
            started=self.started, commit=self.commit, rounds=self.rounds, seconds=self.seconds,
            load_before=self.load_before, stolen=self.stolen,
        )  # fmt: skip
        return self.stamps.get(suite, whole)

    def measured(self) -> list[str]:
        """Suites in the order they were measured, then `counts` if anything was counted."""
        return [*dict.fromkeys(point.suite for point in self.points), *([COUNTS] if self.counts else [])]
