"""Limits and shares with the real daemon and clock: what gets through over what should, and how long requests took.

One farm for each number of reactors; its limits change from case to case by `nbdvvol apply`, as an operator's would.
Figures of a busy machine are its own: what must hold exactly is asserted in simulated time (tests/sim/test_qos.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from perf import generators, machine, report
from perf.generators import PointError
from perf.model import Count, PointResult, Result, Sample
from perf.peers import OURS, ROOT, filter_of
from perf.run import Options, Say, fill
from perf.servers import Place, Plan, Running, free_port, running
from perf.suites import Load

FILE_BYTES = 64 << 20
QUANTUM_S = 0.0002
"""The data plane wakes who waits up to that late (native/include/limits.h), and says so in its bound."""
APPLY_LIMIT_S = 60.0
VM = "bench"
SHARES = {"three": 300, "one": 100}
ACHIEVED = "achieved / limit"
LONG = "p99.9 latency / bound"
SHARE = "got / share"


@dataclass(frozen=True)
class Limit:
    """What is asked for, and the block size it is tried with."""

    name: str
    qos: dict[str, int | str]
    rate: float
    """In I/Os a second of that block size."""
    block: str


LIMITS = (
    Limit("iops-2000", {"iops": 2000}, 2000, "4k"),
    Limit("bandwidth-64MiB", {"bandwidth": "64MiB/s"}, 1024, "64k"),
)
DEPTHS = (1, 32)
CONNECTIONS = (1, 4)
REACTORS = (1, 2)


@dataclass
class _Farm:
    """A running farm whose profiles can change."""

    place: Place
    profiles: dict[str, dict[str, Any]]
    server: Running | None = None
    spec: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        path = self.place.folder / "farm.yaml"
        stores = {name: {"kind": "file", "path": f"{self.place.file}.{name}"} for name in self.profiles}
        vvols = {name: {"adopt": {"datastore": name}, "profile": name} for name in self.profiles}
        spec = {
            "datastores": stores,
            "profiles": {name: {"datastore": name, **profile} for name, profile in self.profiles.items()},
            "hosts": {"local": {"spin_us": self.place.spin_us, "reactors": self.place.reactors}},
            "vms": {VM: {"vvols": vvols}},
        }
        path.write_text(json.dumps(spec))
        return path

    def plan(self) -> Plan:
        self.place.socket.symlink_to(self.place.folder / "run" / "vms" / f"{VM}.sock")
        folders = ["--state", str(self.place.folder / "state"), "--run", str(self.place.folder / "run")]
        command = [sys.executable, "-m", "nbdvvol", "up", "-f", str(self.write()), *folders]
        return Plan(command, "", environment={"PYTHONPATH": str(ROOT)}, find_pid=filter_of, ready="\nready\n")

    def apply(self, name: str, profile: dict[str, Any]) -> None:
        """Change a profile of the running farm. Raises PointError with the command's words."""
        self.profiles[name] = profile
        command = [sys.executable, "-m", "nbdvvol", "apply", "-f", str(self.write())]
        done = subprocess.run(
            [*command, "--run", str(self.place.folder / "run")], capture_output=True, text=True, check=False,
            timeout=APPLY_LIMIT_S, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if done.returncode != 0:
            raise PointError(f"apply: {done.stderr.strip()[-300:]}")

    def load(self, name: str, load: Load, seconds: float, build: Path) -> Sample:
        """One sample on a VVol."""
        assert self.server is not None
        return generators.loadgen(build / "loadgen", replace(self.server, export=name), load, OURS, 0, seconds)


@contextmanager
def _farm(options: Options, reactors: int, profiles: dict[str, dict[str, Any]]) -> Iterator[_Farm]:
    with (
        tempfile.TemporaryDirectory(prefix="nv", dir="/tmp") as name,
        tempfile.TemporaryDirectory(prefix="nbdvvol-perf-", dir=options.tmpfs) as store,
    ):
        file = Path(store) / "disk"
        place = Place(Path(name), "tmpfs", "unix", file, FILE_BYTES, free_port(), options.build, reactors=reactors)
        farm = _Farm(place, profiles)
        for profile in profiles:
            fill(Path(f"{file}.{profile}"), FILE_BYTES)
        with running(farm.plan(), place) as server:
            farm.server = server
            yield farm


def bound_s(limit: Limit, depth: int, connections: int) -> float:
    """The longest that a request may take under a limit (docs/performance.md), beside the machine's own time."""
    return depth * (connections / limit.rate + QUANTUM_S)


def _point(name: str, load: Load, sample: Sample) -> PointResult:
    spec = {key: str(value) for key, value in load.model_dump(exclude_none=True).items()}
    return PointResult(
        suite="qos", point=name, generator="loadgen", backend="tmpfs", transport="unix", spec=spec, samples=(sample,)
    )


def limits(options: Options, seconds: float, say: Say) -> Iterator[tuple[PointResult, list[Count]]]:
    """Every limit at every depth, number of connections and of reactors."""
    for reactors in REACTORS:
        with _farm(options, reactors, {"disk": {}}) as farm:
            for limit in LIMITS:
                farm.apply("disk", {"qos": limit.qos})
                for depth, connections in product(DEPTHS, CONNECTIONS):
                    load = Load(mix="read=100", block=limit.block, depth=depth, connections=connections)
                    name = f"{limit.name}-d{depth}-c{connections}-r{reactors}"
                    sample = farm.load("disk", load, seconds, options.build)
                    ratio = sample.iops / limit.rate
                    waited = sample.latency.p999_us / 1e6 / bound_s(limit, depth, connections)
                    say(f"  {name}: {ratio:.4f} of the limit, p99.9 latency {waited:.2f} of its bound")
                    yield (
                        _point(name, load, sample),
                        [
                            Count(peer=OURS, work=name, name=ACHIEVED, value=ratio, tolerance=0.05),
                            Count(peer=OURS, work=name, name=LONG, value=waited, tolerance=1.0),
                        ],
                    )


def shares(options: Options, seconds: float, say: Say) -> Iterator[tuple[PointResult, list[Count]]]:
    """Two VVols with unequal shares on one reactor that they keep busy together.

    Deep queues: where both clients share a processor, each sends nothing while the other runs, and what waits at the
    server must last that long."""
    load = Load(mix="read=100", block="4k", depth=256, connections=8)
    profiles = {name: {"qos": {"shares": part}} for name, part in SHARES.items()}
    with _farm(options, 1, profiles) as farm, ThreadPoolExecutor(len(SHARES)) as pool:
        jobs = {name: pool.submit(farm.load, name, load, seconds, options.build) for name in SHARES}
        samples = {name: job.result() for name, job in jobs.items()}
    whole = sum(sample.iops for sample in samples.values())
    for name, part in SHARES.items():
        ratio = samples[name].iops / whole / (part / sum(SHARES.values()))
        work = f"shares-{part}-of-{sum(SHARES.values())}"
        say(f"  {work}: {samples[name].iops:,.0f} of {whole:,.0f} requests a second, {ratio:.4f} of its part")
        yield _point(work, load, samples[name]), [Count(peer=OURS, work=work, name=SHARE, value=ratio, tolerance=0.2)]


def run(options: Options, seconds: float, say: Say) -> Result:
    """All of it as a result file of its own. Raises PointError, ServerError."""
    generators.build(options.build)
    options.disk.mkdir(parents=True, exist_ok=True)
    load_before, started, ticks = os.getloadavg()[0], datetime.now(UTC), machine.processor_ticks()
    found = [*limits(options, seconds, say), *shares(options, seconds, say)]
    return Result(
        started=started.isoformat(timespec="seconds"), commit=machine.commit(ROOT), complete=False, quick=options.quick,
        rounds=1, seconds=seconds, load_before=load_before, stolen=machine.stolen_since(ticks),
        machine=machine.describe(options.disk), points=tuple(point for point, _ in found),
        counts=tuple(count for _, counts in found for count in counts),
    )  # fmt: skip


def markdown(result: Result) -> str:
    """The result as a page: what got through, what requests took, and the machine."""
    counted: dict[str, dict[str, float]] = {}
    for count in result.counts:
        counted.setdefault(count.work, {})[count.name] = count.value
    lines = [
        "# Limits and shares, measured",
        "",
        f"{result.started}, commit {result.commit}, {result.seconds} s each, 1 round.",
        *report.warnings(result),
        "",
        *report.table_head(["case", "requests/s", ACHIEVED, SHARE, "p50 ms", "p99.9 ms", LONG]),
    ]
    for point in result.points:
        sample, figures = point.samples[0], counted[point.point]
        ratios = [f"{figures[name]:.4f}" if name in figures else "" for name in (ACHIEVED, SHARE)]
        times = [f"{us / 1000:.2f}" for us in (sample.latency.p50_us, sample.latency.p999_us)]
        long = f"{figures[LONG]:.2f}" if LONG in figures else ""
        lines.append("| " + " | ".join([point.point, f"{sample.iops:,.0f}", *ratios, *times, long]) + " |")
    return "\n".join([*lines, "", *report.machine_lines(result.machine), ""])
