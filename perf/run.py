"""A run: all peers of a suite up at once, each point A B C A B C ..., everything kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from perf import generators, machine, suites
from perf.generators import PointError
from perf.model import Backend, PointResult, Result, Sample
from perf.peers import PEERS, ROOT, STORAGE, Peer
from perf.servers import Place, Running, ServerError, free_port, running
from perf.suites import Suite

Say = Callable[[str], None]
QUICK_SUITES = ("core",)
CHUNK = 1 << 20


@dataclass
class Options:
    """What to run and how long. Sizes are bytes, times seconds."""

    suites: Sequence[str] = ()
    peers: Sequence[str] = ()
    points: Sequence[str] = ()
    rounds: int = 5
    seconds: float = 1.0
    size: int = 1 << 30
    quick: bool = False
    build: Path = field(default_factory=lambda: ROOT / "build" / "perf")
    tmpfs: Path = Path("/dev/shm")
    disk: Path = field(default_factory=lambda: ROOT / "build" / "perf" / "disk")

    def quickened(self) -> Options:
        """The same, small: proves that everything works, measures nothing worth printing."""
        return Options(
            self.suites or QUICK_SUITES, self.peers, self.points, 2, min(self.seconds, 0.2),
            min(self.size, 128 << 20), True, self.build, self.tmpfs, self.disk,
        )  # fmt: skip


def fill(path: Path, size: int) -> None:
    """Real bytes everywhere: no holes, no unwritten extents, nothing that compresses."""
    noise = os.urandom(CHUNK)
    with path.open("wb") as out:
        for at in range(0, size, CHUNK):
            out.write(noise[: min(CHUNK, size - at)])
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _files(options: Options, backend: Backend) -> Iterator[Callable[[str], Path]]:
    """Makes a filled file per peer: servers lock theirs, and two caches of one file would help each other."""
    parent = options.disk if backend == "disk" else options.tmpfs
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="nbdvvol-perf-", dir=parent))

    def make(name: str) -> Path:
        path = folder / f"{name}.img"
        if backend != "null":
            fill(path, options.size)
        return path

    try:
        yield make
    finally:
        shutil.rmtree(folder)


@dataclass
class _Field:
    """The servers of one suite, running."""

    running: dict[str, Running]
    storage: Path | None
    skipped: dict[str, str]


def _wanted(options: Options, suite: Suite) -> list[Peer]:
    chosen = [p for p in PEERS if p.serves(suite.backend, suite.transport) and p.name not in suite.without]
    return [p for p in chosen if not options.peers or p.name in options.peers]


@contextmanager
def field_of(options: Options, suite: Suite, say: Say) -> Iterator[_Field]:
    """Start every peer that takes part; one that cannot is skipped, and says why."""
    with ExitStack() as stack:
        make = stack.enter_context(_files(options, suite.backend))
        found = _Field({}, None, {})
        for peer in _wanted(options, suite):
            reason = peer.missing()
            if reason is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nv", dir="/tmp")))
                place = Place(
                    folder, suite.backend, suite.transport, make(peer.name), options.size, free_port(), options.build
                )
                try:
                    found.running[peer.name] = stack.enter_context(running(peer.plan(place), place))
                    continue
                except (ServerError, LookupError, OSError) as error:
                    reason = str(error)
            found.skipped[peer.name] = reason
            say(f"  {peer.name} left out: {reason}")
        if suite.backend != "null" and suite.generator == "loadgen" and (not options.peers or STORAGE in options.peers):
            found.storage = make(STORAGE)
        yield found


def _one(options: Options, suite: Suite, point: str, peer: str, server: Running, turn: int) -> Sample:
    if suite.generator == "fio":
        return generators.fio_nbd(server, suite, point, peer, turn, options.seconds)
    tool = options.build / "loadgen"
    return generators.loadgen(tool, server, suite.points[point], peer, turn, options.seconds)


def run_point(options: Options, suite: Suite, point: str, servers: _Field, say: Say) -> PointResult:
    """All rounds of one point. A peer that fails is recorded, and left out of the rounds that remain."""
    samples: list[Sample] = []
    failures: dict[str, str] = {}
    for turn in range(options.rounds):
        for peer, server in servers.running.items():
            if peer in failures:
                continue
            try:
                samples.append(_one(options, suite, point, peer, server, turn))
            except PointError as error:
                failures[peer] = str(error)
                say(f"  {point}: {peer} failed: {error}")
        if servers.storage is not None:
            load, direct = suite.points[point], suite.backend == "disk"
            try:
                bare = generators.storage(load, servers.storage, options.size, direct, turn, options.seconds)
                samples += [bare] if bare else []
            except PointError as error:
                failures[STORAGE] = str(error)
    return PointResult(
        suite=suite.name, point=point, generator=suite.generator, backend=suite.backend, transport=suite.transport,
        spec=suite.spec(point), samples=tuple(samples), failures=tuple(f"{p}: {why}" for p, why in failures.items()),
    )  # fmt: skip


def run_suite(options: Options, suite: Suite, say: Say, skipped: dict[str, str]) -> list[PointResult]:
    """One suite."""
    points = [p for p in suite.point_names() if not options.points or p in options.points]
    if not points:
        return []
    say(f"suite {suite.name}: {len(points)} points, {suite.backend}, {suite.transport}")
    with field_of(options, suite, say) as servers:
        skipped.update({f"{suite.name}/{peer}": why for peer, why in servers.skipped.items()})
        results = []
        for point in points:
            results.append(run_point(options, suite, point, servers, say))
            say(f"  {point}: {_line(results[-1])}")
        return results


def _line(result: PointResult) -> str:
    latest = {sample.peer: sample for sample in result.samples}
    return ", ".join(f"{peer} {sample.iops:,.0f}" for peer, sample in latest.items())


def run(options: Options, say: Say) -> Result:
    """Everything that was asked for. Raises SuiteError for an unknown suite before anything starts."""
    chosen = [suites.load(name) for name in (options.suites or suites.names())]
    generators.build(options.build)
    options.disk.mkdir(parents=True, exist_ok=True)
    load_before, started = os.getloadavg()[0], datetime.now(UTC)
    points: list[PointResult] = []
    skipped: dict[str, str] = {}
    for suite in chosen:
        points += run_suite(options, suite, say, skipped)
    return Result(
        started=started.isoformat(timespec="seconds"), commit=machine.commit(ROOT), quick=options.quick,
        rounds=options.rounds, seconds=options.seconds, load_before=load_before,
        machine=machine.describe(options.disk), points=tuple(points), skipped=skipped,
    )  # fmt: skip
