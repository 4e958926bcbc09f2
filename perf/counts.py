"""What can be counted instead of timed: system calls, instructions, allocations and copies per request.

Each figure is a difference: the same work with N and with 5 N requests, so that connecting, the first
touch of memory and closing cancel out. The load generator runs in lockstep (`depth` requests in one
write, then all replies), so that how requests meet in batches depends little on timing, and nobody spins.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from perf import bars, callgrind, idle, machine
from perf import profile as profiles
from perf.generators import PointError, loadgen_json, serving
from perf.model import COUNTS, Count, Result
from perf.neighbours import Watch
from perf.peers import BY_NAME, CEILING, MILLION, OURS, OURS_MILLION_RUNS, OURS_ONE_RUN, ROOT
from perf.run import Options, fill
from perf.servers import Place, Running, ServerError, free_port

Say = Callable[[str], None]
FILE_BYTES = 64 << 20
ALLOCATORS = ("malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign")
COPIERS = ("memcpy", "memmove")
SETTLE_S = 60
AFTERGLOW_S = 0.2
"""What the serving thread still does once the client has its last answer counts, too."""


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


READ = Work(bars.MAP_LOAD, ("--mix", "read=100"), 32)
WORKS = (
    Work("read-4k-qd1", ("--mix", "read=100"), 1),
    READ,
    Work("read-4k-qd32-structured", ("--mix", "read=100", "--structured"), 32),
    Work("write-4k-qd32", ("--mix", "write=100"), 32),
    Work("read-256k-qd8", ("--mix", "read=100"), 8, "256k"),
    Work("write-256k-qd8", ("--mix", "write=100"), 8, "256k"),
)


@contextmanager
def _serving(options: Options, peer: str, size: int = FILE_BYTES) -> Iterator[Running]:
    """One server on a tmpfs file, not spinning."""
    with (
        tempfile.TemporaryDirectory(prefix="nv", dir="/tmp") as name,
        tempfile.TemporaryDirectory(prefix="nbdvvol-perf-", dir=options.tmpfs) as store,
    ):
        file = Path(store) / "disk.img"
        if shutil.disk_usage(store).free < size:
            raise PointError(f"{options.tmpfs} has no room for a file of {size >> 20} MiB")
        fill(file, size)
        place = Place(Path(name), "tmpfs", "unix", file, size, free_port(), options.build, spin_us=0)
        with serving(BY_NAME[peer], place) as server:
            yield server


def _load(options: Options, server: Running, work: Work, requests: int) -> None:
    loadgen_json(options.build / "loadgen", server, work.load(requests), limit_s=600)


# ---- system calls ----


def parse_strace(text: str) -> Counter[str]:
    """Calls by name, from `strace -c -U calls,name`."""
    rows = [line.split() for line in text.splitlines()]
    return Counter({row[1]: int(row[0]) for row in rows if len(row) == 2 and row[0].isdecimal() and row[1] != "total"})


@contextmanager
def straced(pid: int, out: Path, *, threads: bool = True) -> Iterator[None]:
    """Count the system calls of a process (or, without `threads`, of one thread) for the length of the block.

    Raises PointError when it cannot be traced."""
    if not shutil.which("strace"):
        raise PointError("strace is not installed")
    command = ["strace", *(["-f"] if threads else []), "-c", "-U", "calls,name", "-o", str(out), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            raise PointError(f"cannot count system calls: {said.strip()}")
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=SETTLE_S)


def _calls(options: Options, server: Running, work: Work, requests: int) -> Counter[str]:
    with tempfile.TemporaryDirectory(prefix="nvcalls") as folder:
        out = Path(folder) / "calls"
        with straced(server.pid, out):
            _load(options, server, work, requests)
        return parse_strace(out.read_text())


def system_calls(options: Options, peer: str, requests: int, say: Say) -> list[Count]:
    """Per request, of all threads, for each work."""
    counts = []
    with _serving(options, peer) as server:
        for work in WORKS:
            _load(options, server, work, requests)
            few = _calls(options, server, work, requests)
            many = _calls(options, server, work, 5 * requests)
            many.subtract(few)
            value = sum(many.values()) / (4 * requests)
            counts.append(Count(peer=peer, work=work.name, name="system calls", value=value, tolerance=0.2))
            named = ", ".join(f"{n / (4 * requests):.3f} {name}" for name, n in many.most_common(4) if n > 0)
            say(f"  {peer} {work.name}: {value:.3f} system calls per request: {named}")
    return counts


# ---- instructions, allocations, copies ----


def threads_of(pid: int) -> set[int]:
    """Its threads, without the kernel's own that do io_uring's blocking work, which come and go meanwhile."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if not (task / "comm").read_text().startswith("iou-"):
                found.add(int(task.name))
    return found


def busiest_thread(pid: int, among: set[int], load: Callable[[], None]) -> int:
    """Which of these threads serves: it uses the most processor time under load."""

    def times() -> dict[int, int]:
        return {i: int(Path(f"/proc/{pid}/task/{i}/schedstat").read_text().split()[0]) for i in among}

    before = times()
    load()
    after = times()
    return max(among, key=lambda thread: after[thread] - before[thread])


def stepped(tool: Path, pid: int, thread: int, load: Callable[[], None]) -> profiles.Profile:
    """Every instruction that `thread` executes during `load`. Raises PointError when it cannot be traced."""
    with tempfile.TemporaryDirectory(prefix="nvsteps") as folder:
        out = Path(folder) / "steps"
        command = [str(tool), str(thread), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as counter:
            assert counter.stdout is not None and counter.stderr is not None
            if counter.stdout.readline() != "counting\n":
                raise PointError(f"cannot count instructions: {counter.stderr.read().strip()}")
            try:
                load()
                time.sleep(AFTERGLOW_S)
                where = profiles.mappings(Path(f"/proc/{pid}/maps").read_text())
            finally:
                counter.terminate()
                counter.wait(timeout=SETTLE_S)
            if counter.returncode != 0:
                raise PointError(f"counting instructions failed: {counter.stderr.read().strip()}")
        return profiles.parse(out.read_text(), where)


def profile_work(options: Options, server: Running, work: Work, requests: int) -> profiles.Profile:
    """What 4 x `requests` requests execute in the serving thread, connecting and closing cancelled out.

    In the servers this is for (ours and the ceiling), that is not the main thread, which accepts."""
    others = threads_of(server.pid) - {server.pid}
    thread = busiest_thread(server.pid, others, lambda: _load(options, server, work, 64 * requests))
    tool = options.build / "steps"
    few = stepped(tool, server.pid, thread, lambda: _load(options, server, work, requests))
    many = stepped(tool, server.pid, thread, lambda: _load(options, server, work, 5 * requests))
    return many.minus(few)


def allocations(profile: profiles.Profile) -> int:
    """Calls of the C library's allocator."""
    return sum(count for function, count in profile.calls.items() if function in ALLOCATORS)


def library_copies(profile: profiles.Profile) -> int:
    """Calls of memcpy and memmove; what the compiler copies by itself is a few bytes."""
    return sum(count for function, count in profile.calls.items() if function in COPIERS)


def instructions(options: Options, peer: str, requests: int, say: Say) -> list[Count]:
    """User-space instructions, allocator calls and library copies per request, for each work."""
    counts = []
    total = 4 * requests
    with _serving(options, peer) as server:
        for work in WORKS:
            profile = profile_work(options, server, work, requests)
            figures = (
                (bars.INSTRUCTIONS, profile.instructions),
                ("allocations", allocations(profile)),
                ("library copies", library_copies(profile)),
            )
            counts += [
                Count(peer=peer, work=work.name, name=name, value=value / total, tolerance=0.01)
                for name, value in figures
            ]
            say(f"  {peer} {work.name}: {profile.instructions / total:,.0f} instructions per request; most of it:")
            for function, own in profile.own.most_common(12):
                say(f"    {own / total:8.1f}  {function}")
    return counts


def map_cost(options: Options, requests: int, say: Say) -> list[Count]:
    """Instructions per request on one file as a single region, and as a million runs in random order."""
    counts = []
    for peer in (OURS_ONE_RUN, OURS_MILLION_RUNS):
        with _serving(options, peer, MILLION * 4096) as server:
            value = profile_work(options, server, READ, requests).instructions / (4 * requests)
        say(f"  {peer} {READ.name}: {value:,.1f} instructions per request")
        counts.append(Count(peer=peer, work=READ.name, name=bars.INSTRUCTIONS, value=value, tolerance=0.01))
    return counts


def simulated(say: Say) -> list[Count]:
    """Instructions above the I/O port, by callgrind: the same on every run, so the smallest change shows."""
    counts = []
    program = callgrind.build()
    named = {**{load: (batch, f"{load}-4k") for load, batch in callgrind.LOADS.items()}, **callgrind.CACHES}
    for load, (batch, name) in named.items():
        rooms = callgrind.per_request(program, load)
        value = sum(rooms.values())
        say(f"  {OURS} {load}, simulated port: {value:,.1f} instructions per request above it: {rooms}")
        work = f"{name}-qd{batch}, simulated port" if load in callgrind.LOADS else f"{name}, simulated port"
        counts.append(Count(peer=OURS, work=work, name=bars.INSTRUCTIONS, value=value, tolerance=0.005))
        if work == bars.MIRROR_LOAD:
            part = callgrind.share(program, load, callgrind.INTENT_FILES)
            say(f"  {OURS} {load}, simulated port: a warm region's intent check is {part:.2%} of that")
            counts.append(Count(peer=OURS, work=work, name=bars.INTENT, value=part, tolerance=0.02))
    return counts


def _attempt(peer: str, say: Say, step: Callable[[], list[Count]]) -> list[Count]:
    try:
        return step()
    except (PointError, ServerError, OSError) as error:
        say(f"  {peer}: not counted: {error}")
        return []


def counted(result: Result, options: Options, peers: tuple[str, ...], say: Say) -> Result:
    """A result with everything counted anew, and stamped."""
    watch = Watch()
    counts = count_all(options, peers, say)
    stamp = watch.stamp(machine.commit(ROOT), 1, 0.0, ())
    return result.model_copy(update={"counts": counts, "stamps": {**result.stamps, COUNTS: stamp}})


def count_all(options: Options, peers: tuple[str, ...], say: Say) -> tuple[Count, ...]:
    """System calls of every peer given; instructions where one thread does the serving; ours: idle and map, too."""
    counts: list[Count] = []
    requests, few = (640, 32) if options.quick else (3200, 32)
    for peer in peers:
        if BY_NAME[peer].missing():
            continue
        counts += _attempt(peer, say, partial(system_calls, options, peer, requests, say))
        if peer in (OURS, CEILING):
            counts += _attempt(peer, say, partial(instructions, options, peer, few, say))
        if peer == OURS:
            counts += _attempt(peer, say, partial(simulated, say))
            counts += _attempt(peer, say, partial(map_cost, options, few, say))
            counts += _attempt(peer, say, partial(idle.measure, options, say))
    return tuple(counts)
