"""What can be counted instead of timed: system calls, instructions, allocations and copies per request.

Each figure is a difference: the same work with N and with 5 N requests, so that connecting, the first
touch of memory and closing cancel out. The load generator runs in lockstep (`depth` requests in one
write, then all replies), so that how requests meet in batches depends little on timing.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from perf import profile as profiles
from perf.generators import PointError, loadgen_json
from perf.model import Count, Transport
from perf.peers import BY_NAME, CEILING, OURS
from perf.run import Options, fill
from perf.servers import Place, Running, ServerError, free_port, running

Say = Callable[[str], None]
FILE_BYTES = 64 << 20
IDLE_CONNECTIONS = 1000
IDLE_S = 5.0
ALLOCATORS = ("malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign")
COPIERS = ("memcpy", "memmove")


@dataclass(frozen=True)
class Work:
    """A load whose cost is counted."""

    name: str
    arguments: tuple[str, ...]
    depth: int
    block: str = "4k"

    def load(self, requests: int) -> list[str]:
        """The load generator's arguments for that many requests."""
        shape = ["--depth", str(self.depth), "--block", self.block, "--count", str(requests), "--lockstep"]
        return [*self.arguments, *shape]


WORKS = (
    Work("read-4k-qd1", ("--mix", "read=100"), 1),
    Work("read-4k-qd32", ("--mix", "read=100"), 32),
    Work("read-4k-qd32-structured", ("--mix", "read=100", "--structured"), 32),
    Work("write-4k-qd32", ("--mix", "write=100"), 32),
    Work("read-256k-qd8", ("--mix", "read=100"), 8, "256k"),
    Work("write-256k-qd8", ("--mix", "write=100"), 8, "256k"),
)


@contextmanager
def _serving(options: Options, peer: str, transport: Transport = "unix") -> Iterator[Running]:
    """One server on a tmpfs file, not spinning."""
    with (
        tempfile.TemporaryDirectory(prefix="nv", dir="/tmp") as name,
        tempfile.TemporaryDirectory(prefix="nbdvvol-perf-", dir=options.tmpfs) as store,
    ):
        file = Path(store) / "disk.img"
        fill(file, FILE_BYTES)
        place = Place(Path(name), "tmpfs", transport, file, FILE_BYTES, free_port(), options.build, 0)
        with running(BY_NAME[peer].plan(place), place) as server:
            yield server


def _load(options: Options, server: Running, work: Work, requests: int) -> None:
    loadgen_json(options.build / "loadgen", server, work.load(requests), limit_s=600)


# ---- system calls and what else the kernel's tracepoints tell ----

EVENTS = {
    "raw_syscalls:sys_enter": ("system calls", 0.2),
    "io_uring:io_uring_queue_async_work": ("hand-overs to io-wq", 0.2),
    "context-switches": ("context switches", 0.5),
}
"""perf's events: unlike strace they do not slow the server down. With each: our name, and its tolerance."""


def parse_perf_stat(text: str) -> dict[str, int]:
    """Counts of `perf stat -x,` by our names; an event the kernel lacks is left out."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        fields = line.split(",")
        name = EVENTS.get(fields[2].removesuffix(":u"), ("", 0.0))[0] if len(fields) > 2 else ""
        if name and fields[0].isdecimal():
            found[name] = int(fields[0])
    return found


def _events_once(options: Options, server: Running, work: Work, requests: int) -> dict[str, int]:
    arguments = [*server.loadgen_arguments(), *work.load(requests)]
    command = ["perf", "stat", "-x,", "-e", ",".join(EVENTS), "-p", str(server.pid), "--"]
    done = subprocess.run(
        [*command, str(options.build / "loadgen"), *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    found = parse_perf_stat(done.stderr)
    if not found and not Path("/sys/kernel/tracing/events").is_dir():
        raise PointError("no tracepoints: mount -t tracefs none /sys/kernel/tracing")
    if done.returncode != 0 or not found:
        raise PointError(f"perf stat counted nothing: {done.stderr.strip()[-300:]}")
    return found


def kernel_events(options: Options, peer: str, requests: int, say: Say) -> list[Count]:
    """Per request, for each work."""
    counts = []
    tolerances = dict(EVENTS.values())
    with _serving(options, peer) as server:
        for work in WORKS:
            _load(options, server, work, requests)
            few = _events_once(options, server, work, requests)
            many = _events_once(options, server, work, 5 * requests)
            values = {name: (many[name] - few[name]) / (4 * requests) for name in few.keys() & many.keys()}
            counts += [
                Count(peer=peer, work=work.name, name=name, value=values[name], tolerance=tolerances[name])
                for name in sorted(values)
            ]
            said = ", ".join(f"{value:.3f} {name}" for name, value in sorted(values.items()))
            say(f"  {peer} {work.name}: {said}")
    return counts


# ---- instructions, allocations, copies ----


def _busiest_thread(pid: int, load: Callable[[], None]) -> int:
    """The one that serves: it uses the most processor time under load. The kernel's io_uring workers are not it."""

    def times() -> dict[int, int]:
        tasks = [t for t in Path(f"/proc/{pid}/task").iterdir() if not (t / "comm").read_text().startswith("iou-")]
        return {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}

    before = times()
    load()
    after = times()
    return max(after, key=lambda thread: after[thread] - before.get(thread, 0))


def _steps(options: Options, server: Running, thread: int, work: Work, requests: int) -> profiles.Profile:
    """One load, every instruction of `thread` counted."""
    with tempfile.TemporaryDirectory(prefix="nvsteps") as folder:
        out = Path(folder) / "steps"
        command = [str(options.build / "steps"), str(thread), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as counter:
            assert counter.stdout is not None and counter.stderr is not None
            if counter.stdout.readline() != "counting\n":
                raise PointError(f"cannot count instructions: {counter.stderr.read().strip()}")
            try:
                _load(options, server, work, requests)
                where = profiles.mappings(Path(f"/proc/{server.pid}/maps").read_text())
            finally:
                counter.terminate()
                counter.wait(timeout=60)
            if counter.returncode != 0:
                raise PointError(f"counting instructions failed: {counter.stderr.read().strip()}")
        return profiles.parse(out.read_text(), where)


def profile_work(options: Options, peer: str, work: Work, requests: int) -> profiles.Profile:
    """What 4 x `requests` requests execute in the serving thread, connecting and closing cancelled out."""
    with _serving(options, peer) as server:
        thread = _busiest_thread(server.pid, lambda: _load(options, server, work, 64 * requests))
        few = _steps(options, server, thread, work, requests)
        return _steps(options, server, thread, work, 5 * requests).minus(few)


def _sum(calls: dict[str, int], names: tuple[str, ...]) -> int:
    return sum(count for function, count in calls.items() if function in names)


def instructions(options: Options, peer: str, requests: int, say: Say) -> list[Count]:
    """User-space instructions, allocator calls and library copies per request, for each work."""
    counts = []
    for work in WORKS:
        profile = profile_work(options, peer, work, requests)
        total = 4 * requests
        figures = (
            ("instructions", profile.instructions, 0.01),
            ("allocations", _sum(profile.calls, ALLOCATORS), 0.01),
            ("library copies", _sum(profile.calls, COPIERS), 0.01),
        )
        counts += [
            Count(peer=peer, work=work.name, name=name, value=value / total, tolerance=tolerance)
            for name, value, tolerance in figures
        ]
        say(f"  {peer} {work.name}: {profile.instructions / total:,.0f} instructions per request; most of it:")
        for function, own in profile.own.most_common(12):
            say(f"    {own / total:8.1f}  {function}")
    return counts


# ---- idle connections ----


def idle(options: Options, peer: str, say: Say) -> list[Count]:
    """What many idle connections cost: processor share, and private memory each. By TCP: a VM's socket takes fewer."""
    with _serving(options, peer, "tcp") as server:
        arguments = ["--connections", str(IDLE_CONNECTIONS), "--idle", str(IDLE_S), "--warmup", "1"]
        out = loadgen_json(options.build / "loadgen", server, arguments, limit_s=120)["server"]
    each = (out["rss_anon_bytes"] - out["rss_anon_before_bytes"]) / IDLE_CONNECTIONS
    work = f"{IDLE_CONNECTIONS} idle connections"
    say(f"  {peer} {work}: {out['cpu_fraction']:.4%} of a processor, {each / 1024:.1f} KiB each")
    return [
        Count(peer=peer, work=work, name="processors", value=out["cpu_fraction"], tolerance=1.0),
        Count(peer=peer, work=work, name="private bytes each", value=each, tolerance=0.1),
    ]


def _attempt(peer: str, say: Say, step: Callable[[], list[Count]]) -> list[Count]:
    try:
        return step()
    except (PointError, ServerError, OSError) as error:
        say(f"  {peer}: not counted: {error}")
        return []


def count_all(options: Options, peers: tuple[str, ...], say: Say) -> tuple[Count, ...]:
    """System calls and idle cost of every peer given; instructions where one thread does the serving."""
    counts: list[Count] = []
    requests = 3200 if options.quick else 16000
    for peer in peers:
        if BY_NAME[peer].missing():
            continue
        counts += _attempt(peer, say, partial(kernel_events, options, peer, requests, say))
        counts += _attempt(peer, say, partial(idle, options, peer, say))
        if peer in (OURS, CEILING):
            few = 64 if options.quick else 320
            counts += _attempt(peer, say, partial(instructions, options, peer, few, say))
    return tuple(counts)
