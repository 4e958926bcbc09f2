"""A run: all servers of a suite up at once, its points measured in rounds A B C, B C A, ..., everything kept.

A round goes through every point of the suite, and at each point through every server, another one first in each
round: what a ratio compares lies seconds apart, and what a median is taken over is spread over the whole suite's time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from perf import generators, machine, resync, suites
from perf.generators import PointError
from perf.model import PointResult, Result, Sample, Stamp
from perf.neighbours import Watch
from perf.peers import OURS, PEERS, ROOT, STORAGE, Peer
from perf.progress import Progress
from perf.servers import Place, Running, ServerError, free_port
from perf.suites import RESYNC, Suite, bytes_of

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
    seconds: float = 0.7
    size: int = 1 << 30
    quick: bool = False
    build: Path = field(default_factory=lambda: ROOT / "build" / "perf")
    tmpfs: Path = Path("/dev/shm")
    disk: Path = field(default_factory=lambda: ROOT / "build" / "perf" / "disk")

    @property
    def complete(self) -> bool:
        """Whether this asks for everything there is, at full length."""
        return not (self.suites or self.peers or self.points or self.quick)

    def quickened(self) -> Options:
        """The same, small: proves that everything works, measures nothing worth printing."""
        return replace(
            self, suites=self.suites or QUICK_SUITES, rounds=min(self.rounds, 2), seconds=min(self.seconds, 0.2),
            size=min(self.size, 128 << 20), quick=True,
        )  # fmt: skip


def fill(path: Path, size: int) -> None:
    """Real bytes everywhere: no holes, no unwritten extents, nothing that compresses. On a disk, none stays cached."""
    noise = os.urandom(CHUNK)
    with path.open("wb") as out:
        for at in range(0, size, CHUNK):
            out.write(noise[: min(CHUNK, size - at)])
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class NoRoomError(Exception):
    """The suite's files do not fit where they belong."""


@contextmanager
def _files(options: Options, suite: Suite, size: int, count: int) -> Iterator[Callable[[str, bool], Path]]:
    """Makes a filled file per server (servers lock theirs, and two caches of one file would help each other); or only
    says where the server's own ones go."""
    parent = options.disk if suite.backend == "disk" else options.tmpfs
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = size * (1 if suite.shared_file else count), shutil.disk_usage(parent).free
    if suite.backend != "null" and needed > free:
        raise NoRoomError(f"{parent} has {free >> 20} MiB free and {needed >> 20} MiB are needed; use a smaller --size")
    folder = Path(tempfile.mkdtemp(prefix="nbdvvol-perf-", dir=parent))

    def make(name: str, filled: bool) -> Path:
        path = folder / ("all.img" if suite.shared_file else f"{name}.img")
        if filled and suite.backend != "null" and not path.exists():
            fill(path, size)
        return path

    try:
        yield make
    finally:
        shutil.rmtree(folder)


@dataclass
class _Field:
    """The servers of one suite, running."""

    running: dict[str, Running] = field(default_factory=dict)
    storage: Path | None = None
    """What fio's io_uring engine works on: our own server's file."""
    failed: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """By point, then by server: why it is left out of the rounds that remain."""


def wanted(options: Options, suite: Suite) -> list[Peer]:
    """The servers that take part in a suite."""
    chosen = [p for p in PEERS if p.serves(suite.backend, suite.transport)]
    chosen = [p for p in chosen if (p.name in suite.peers if suite.peers else not p.variant)]
    return [p for p in chosen if not options.peers or p.name in options.peers]


def files_of(peer: Peer) -> int:
    """How many files are made for it."""
    return max(1, peer.legs) if not peer.file_of else 0


def with_storage(options: Options, suite: Suite) -> bool:
    """Whether fio's io_uring engine takes part, on the file itself."""
    return suite.storage and STORAGE in (options.peers or [STORAGE])


def place_of(options: Options, suite: Suite, folder: Path, file: Path, size: int) -> Place:
    """What a server of this suite is asked to serve."""
    return Place(folder, suite.backend, suite.transport, file, size, free_port(), options.build, suite.spin_us)


@contextmanager
def field_of(options: Options, suite: Suite, say: Say, skipped: dict[str, str]) -> Iterator[_Field]:
    """Start every server that takes part; one that cannot is skipped, and says why."""
    size = bytes_of(suite.size) if suite.size else options.size
    peers = wanted(options, suite)
    with ExitStack() as stack:
        make = stack.enter_context(_files(options, suite, size, sum(files_of(peer) for peer in peers)))
        found = _Field()
        for peer in peers:
            reason = peer.missing()
            if reason is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nv", dir="/tmp")))
                place = place_of(options, suite, folder, make(peer.file_of or peer.name, peer.legs == 0), size)
                try:
                    found.running[peer.name] = stack.enter_context(generators.serving(peer, place))
                    continue
                except (ServerError, PointError, LookupError, OSError) as error:
                    reason = str(error)
            skipped[f"{suite.name}/{peer.name}"] = reason
            say(f"  {peer.name} left out: {reason}")
        if with_storage(options, suite):
            found.storage = found.running[OURS].place.file if OURS in found.running else make(STORAGE, True)
        yield found


def _one(options: Options, suite: Suite, point: str, peer: str, server: Running, turn: int) -> list[Sample]:
    """Nothing where the server cannot do what the point asks for; with fio's, where that works on the same files."""
    tool = options.build / "loadgen"
    if suite.generator == "fio":
        return [generators.fio_nbd(server, suite, point, peer, turn, options.seconds)]
    if suite.resync and point == RESYNC:
        return resync.measure(server, peer, turn) if server.resyncs else []
    load = suite.points[point]
    if load.only and peer not in load.only:
        return []
    if not load.resyncing:
        return [generators.loadgen(tool, server, load, peer, turn, options.seconds)]
    if server.resyncs is None:
        return []
    with resync.running(server, server.resyncs):
        return [generators.loadgen(tool, server, load, peer, turn, options.seconds)]


def _storage(options: Options, suite: Suite, point: str, file: Path, size: int, turn: int) -> Sample | None:
    load, direct = suite.points.get(point), suite.backend == "disk"
    if load is None or (load.only and STORAGE not in load.only):
        return None
    return generators.storage(load, file, size, direct, turn, options.seconds)


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """A, B, C; B, C, A; C, A, B: how a server leaves the disk is not always the same next one's burden."""
    first = turn % len(names) if names else 0
    return [*names[first:], *names[:first]]


def _measured(options: Options, suite: Suite, point: str, name: str, servers: _Field, turn: int) -> list[Sample]:
    if name != STORAGE:
        return _one(options, suite, point, name, servers.running[name], turn)
    assert servers.storage is not None
    bare = _storage(options, suite, point, servers.storage, servers.storage.stat().st_size, turn)
    return [bare] if bare else []


def measure(options: Options, suite: Suite, point: str, turn: int, servers: _Field, say: Say) -> list[Sample]:
    """One round of one point. A server that fails is left out of the rounds that remain."""
    samples: list[Sample] = []
    failed = servers.failed[point]
    for name in in_turn([*servers.running, *([STORAGE] if servers.storage else [])], turn):
        if name in failed:
            continue
        try:
            samples += _measured(options, suite, point, name, servers, turn)
        except PointError as error:
            failed[name] = str(error)
            say(f"  {point}: {name} failed: {error}")
    return samples


def points_of(options: Options, suite: Suite) -> list[str]:
    """Those that were asked for."""
    return [p for p in suite.point_names() if not options.points or p in options.points]


def rounds_of(options: Options, suite: Suite) -> int:
    """How often each point of a suite is measured."""
    return min(options.rounds, suite.rounds_max)


@dataclass
class Measured:
    """What a run has so far."""

    points: list[PointResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)


def run_suite(options: Options, suite: Suite, progress: Progress, found: Measured) -> None:
    """One suite; nothing of it is kept if its files do not fit."""
    points = points_of(options, suite)
    if not points:
        return
    progress.say(f"suite {suite.name}: {len(points)} points, {suite.backend}, {suite.transport}")
    samples: dict[str, list[Sample]] = {point: [] for point in points}
    watch, commit = Watch(), machine.commit(ROOT)
    try:
        started = time.monotonic()
        with field_of(options, suite, progress.say, found.skipped) as servers:
            progress.say(
                f"  {len(servers.running)} servers and their files ready after {time.monotonic() - started:.0f} s"
            )
            for turn in range(rounds_of(options, suite)):
                for point in points:
                    started = time.monotonic()
                    samples[point] += measure(options, suite, point, turn, servers, progress.say)
                    took = time.monotonic() - started
                    what = f"{suite.name} {turn + 1} {point}: {_line(samples[point])}"
                    progress.step(suite.generator, servers_of(options, suite), took, what)
            pids = [server.pid for server in servers.running.values()]
            found.stamps[suite.name] = watch.stamp(commit, rounds_of(options, suite), options.seconds, pids)
    except NoRoomError as error:
        found.skipped[suite.name] = str(error)
        progress.say(f"  left out: {error}")
        return
    found.points += [_result(suite, point, samples[point], servers.failed[point]) for point in points]


def _result(suite: Suite, point: str, samples: list[Sample], failed: dict[str, str]) -> PointResult:
    return PointResult(
        suite=suite.name, point=point, generator=suite.generator, backend=suite.backend, transport=suite.transport,
        spec=suite.spec(point), samples=tuple(samples), failures=tuple(f"{p}: {why}" for p, why in failed.items()),
    )  # fmt: skip


def _line(samples: list[Sample]) -> str:
    latest = {sample.peer: sample for sample in samples}
    return ", ".join(f"{peer} {sample.iops:,.0f}" for peer, sample in latest.items())


def servers_of(options: Options, suite: Suite) -> int:
    """How many measurements a round of one point is."""
    return len(wanted(options, suite)) + with_storage(options, suite)


def measurements(options: Options, chosen: list[Suite]) -> dict[str, int]:
    """How many a run makes, by generator."""
    found: dict[str, int] = defaultdict(int)
    for suite in chosen:
        rounds = len(points_of(options, suite)) * rounds_of(options, suite)
        found[suite.generator] += rounds * servers_of(options, suite)
    return dict(found)


def run(options: Options, say: Say) -> Result:
    """Everything that was asked for. Raises SuiteError for an unknown suite before anything starts."""
    return run_suites(options, [suites.load(name) for name in (options.suites or suites.complete())], say)


def run_suites(options: Options, chosen: list[Suite], say: Say) -> Result:
    """These, which may be none. Raises PointError when the measuring tools cannot be built."""
    generators.build(options.build)
    options.disk.mkdir(parents=True, exist_ok=True)
    load_before, started, stolen = os.getloadavg()[0], datetime.now(UTC), machine.processor_ticks()
    progress = Progress(measurements(options, chosen), say)
    if chosen:
        say(f"about {progress.left_s() / 60:.0f} min of measuring, and up to half a minute a suite to start servers")
    found = Measured()
    for suite in chosen:
        run_suite(options, suite, progress, found)
    return Result(
        started=started.isoformat(timespec="seconds"), commit=machine.commit(ROOT), complete=options.complete,
        quick=options.quick, rounds=options.rounds, seconds=options.seconds, load_before=load_before,
        stolen=machine.stolen_since(stolen), machine=machine.describe(options.disk), points=tuple(found.points),
        skipped=found.skipped, stamps=found.stamps,
    )  # fmt: skip
