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
from itertools import product
from pathlib import Path
from typing import Any

from perf import generators, limits, machine
from perf.generators import PointError
from perf.model import PointResult, Result, Sample
from perf.neighbours import Watch
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


def _point(name: str, load: Load, sample: Sample, more: dict[str, str]) -> PointResult:
    spec = {key: str(value) for key, value in load.model_dump(exclude_defaults=True).items()}
    return PointResult(
        suite=limits.SUITE, point=name, generator="loadgen", backend="tmpfs", transport="unix",
        spec={**spec, "connections": str(load.connections), **more}, samples=(sample,),
    )  # fmt: skip


def _case(farm: _Farm, limit: Limit, load: Load, seconds: float, build: Path) -> PointResult:
    reactors = farm.place.reactors
    more = {
        limits.LIMIT: ", ".join(f"{key} {value}" for key, value in limit.qos.items()),
        limits.REACTORS: str(reactors),
        limits.SECONDS: f"{seconds:g}",
        limits.ASKED: f"{limit.rate:g}",
        limits.BOUND: f"{bound_s(limit, load.depth, load.connections) * 1e6:g}",
    }
    name = f"{limit.name}-d{load.depth}-c{load.connections}-r{reactors}"
    return _point(name, load, farm.load("disk", load, seconds, build), more)


def with_limits(options: Options, seconds: float, say: Say) -> Iterator[PointResult]:
    """Every limit at every depth, number of connections and of reactors."""
    for reactors in REACTORS:
        with _farm(options, reactors, {"disk": {}}) as farm:
            for limit in LIMITS:
                farm.apply("disk", {"qos": limit.qos})
                for depth, connections in product(DEPTHS, CONNECTIONS):
                    load = Load(mix="read=100", block=limit.block, depth=depth, connections=connections)
                    point = _case(farm, limit, load, seconds, options.build)
                    for case in limits.cases([point]):
                        waited = f"p99.9 latency {case.waited:.2f} of its bound"
                        say(f"  {case.name}: {case.obtained:.4f} of the limit, {waited}")
                    yield point


def with_shares(options: Options, seconds: float, say: Say) -> list[PointResult]:
    """Two VVols with unequal shares on one reactor that they keep busy together.

    Deep queues: where both clients share a processor, each sends nothing while the other runs, and what waits at the
    server must last that long."""
    load = Load(mix="read=100", block="4k", depth=256, connections=8)
    profiles = {name: {"qos": {"shares": part}} for name, part in SHARES.items()}
    whole = sum(SHARES.values())
    with _farm(options, 1, profiles) as farm, ThreadPoolExecutor(len(SHARES)) as pool:
        jobs = {name: pool.submit(farm.load, name, load, seconds, options.build) for name in SHARES}
        samples = {name: job.result() for name, job in jobs.items()}
    points = [
        _point(
            f"shares-{part}-of-{whole}", load, samples[name],
            {limits.SECONDS: f"{seconds:g}", limits.SHARES: str(part), limits.OF: str(whole)},
        )
        for name, part in SHARES.items()
    ]  # fmt: skip
    for part in limits.parts(points):
        say(f"  {part.name}: {part.sample.iops:,.0f} of {part.together:,.0f} a second, {part.obtained:.4f} of its part")
    return points


def measured(result: Result, options: Options, seconds: float, say: Say) -> Result:
    """A result with limits and shares measured anew, and stamped. Raises PointError, ServerError."""
    watch = Watch()
    points = (*with_limits(options, seconds, say), *with_shares(options, seconds, say))
    stamp = watch.stamp(machine.commit(ROOT), 1, seconds, ())
    return result.model_copy(
        update={
            "points": points, "stamps": {**result.stamps, limits.SUITE: stamp}, "complete": False, "rounds": 1,
            "seconds": seconds,
        }
    )  # fmt: skip
