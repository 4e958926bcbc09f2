"""What a request costs, counted: system calls, ring entries, copies, allocations and instructions of the data plane.

Batches go in lockstep (one send, then all replies), nobody spins, and costs are those of the reactor's own thread:
that makes them counts, which a loaded machine does not change. `LIMITS` is the one place with figures: they hold by
the structure of the code, so whoever makes the code cheaper tightens them, and whoever makes it dearer is told.
"""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdvvol.dataplane.log import LogPolicy
from nbdvvol.dataplane.types import CacheMode, CachePolicy, ReactorStats, Run
from perf import counts, generators
from tests.lib import nbdwords as w
from tests.lib.rawio import Request, Style
from tests.unit.plane_rig import Client, Rig, running

SIZE = 1 << 20
BLOCK = 4096
READS = 32
WRITES = 15
"""A batch of them fits into one receive chunk."""
BATCHES = 50
CACHES = {"hit": 2 << 20, "churn": SIZE // 4}
"""Bytes of the host's cache, where a lane has one."""
LOG = 64 << 20
START_UP = 4
"""Of the whole run: what attaching a tracer, or a batch before, may leave over."""


@dataclass(frozen=True)
class Limits:
    """Most of each that one batch may cost; bytes where the name says so. None: timing decides."""

    receives: int
    ring_entries: int
    system_calls: int
    copied_bytes: int = 0
    allocations: int = 0
    instructions: int | None = None


LIMITS = {
    # Pages in the page cache of a disk's file system: an answer without the ring. Entries: the receive, the send.
    "resident": Limits(receives=1, ring_entries=2, system_calls=READS + 2, instructions=READS * 1700),
    # A file in memory: the send reads its pages. Calls: the send, arming the receive, collecting it, one to sleep.
    "view": Limits(receives=1, ring_entries=1, system_calls=4, instructions=READS * 950),
    # File systems without RWF_NOWAIT: the ring does each read, in a thread of the kernel's, and each may be
    # answered by a send of its own. Calls: at most one a completion, and one to sleep.
    "ring": Limits(receives=1, ring_entries=2 * READS + 1, system_calls=2 * READS + 2),
    # A client's send of 60 KiB may arrive in two parts. The payload is written from where it was received.
    "write": Limits(receives=2, ring_entries=2 * WRITES + 2, system_calls=2 * WRITES + 4),
    # O_DIRECT: small payloads are received together, like headers, and copied to aligned memory of their own: the copy
    # costs less than two receives each. Calls: one for four writes, and two for an answer that comes alone.
    "direct": Limits(
        receives=2,
        ring_entries=2 * WRITES + 2,
        system_calls=3 * WRITES,
        copied_bytes=WRITES * BLOCK,
    ),
    # A file in memory: the payload is stored through the view; the ring has the receives and the sends of the replies.
    # 300 of the instructions move 4 KiB past the processor's cache; 130 would move them through it, in more time.
    "store": Limits(receives=2, ring_entries=4, system_calls=6, instructions=WRITES * 2550),
    # Blocks in the cache: the send reads its frames, as the pages of a file in memory.
    "hit": Limits(receives=1, ring_entries=2, system_calls=5, instructions=READS * 1700),
    # Blocks that push others out: a ring read each, a copy into a frame; nothing of it takes memory from anybody.
    "churn": Limits(receives=1, ring_entries=2 * READS + 1, system_calls=2 * READS + 2),
    # Blocks that go into the log: those of a receive are one write of it. The log's own are two, if two receives are.
    # Of the instructions 2,050 sum up a block, 340 move it past the processor's cache (one would move it through, in
    # more time), 2,100 sum up a record's head. A receive may be cut into two records, halves of what there is.
    "logged": Limits(receives=2, ring_entries=2 + 2 + 2, system_calls=8, instructions=WRITES * 5900),
}


class Lane:
    """One connection whose reactor's costs are known."""

    def __init__(self, rig: Rig, client: Client, file: int) -> None:
        self.rig = rig
        self.client = client
        self.file = file
        self.thread = 0
        self.blocks = list(range(SIZE // BLOCK))
        """Which are asked for; `walks`: other ones with each batch."""
        self.walks = False
        self.at = 0

    @property
    def answers_at_once(self) -> bool:
        """Whether the file system reads resident pages without blocking."""
        try:
            return os.preadv(self.file, [bytearray(BLOCK)], 0, os.RWF_NOWAIT) == BLOCK
        except OSError:
            return False

    def stats(self) -> ReactorStats:
        """The reactor's counters."""
        return self.rig.call(self.rig.plane.reactor_stats)[0]

    def batch(self, command: int, count: int) -> None:
        """All requests in one send, then all replies."""
        places = [self.blocks[(self.at + i) % len(self.blocks)] for i in range(count)]
        self.at += count if self.walks else 0
        payload = bytes(BLOCK) if command == w.CMD_WRITE else b""
        requests = b"".join(
            self.client.header(Request(command, 0, block * BLOCK, BLOCK), i, payload=bool(payload)) + payload
            for i, block in enumerate(places)
        )
        self.client.stream.send(requests)
        each = (20 + 8 if self.client.agreed.structured else 16) + BLOCK if command == w.CMD_READ else 16
        self.client.stream.recv(count * each)

    def spent(self, command: int, count: int) -> ReactorStats:
        """The counters of BATCHES batches; the replies of the last have been sent, all else is over."""
        self.batch(command, count)
        before = self.stats()
        for _ in range(BATCHES):
            self.batch(command, count)
        after = self.stats()
        return ReactorStats(**{name: getattr(after, name) - getattr(before, name) for name in before.__slots__})


@contextmanager
def lane(on: str, style: Style = "simple") -> Iterator[Lane]:
    """A volume on a file of the tree's file system, with or without O_DIRECT, or in memory (tmpfs).

    With a cache (one of CACHES) or a log ("logged")."""
    before = counts.threads_of(os.getpid())
    cache = CACHES.get(on, 0)
    with (
        running(reactors=1, spin_us=0, cache_bytes=cache) as rig,
        tempfile.TemporaryFile(dir=Path(__file__).parent) as disk,
    ):
        mine = counts.threads_of(os.getpid()) - before - {rig.thread.native_id or 0}
        file = os.memfd_create("lane") if on == "tmpfs" else os.dup(disk.fileno())
        how: dict[str, Any] = {"direct": True, "align": BLOCK} if on == "direct" else {}
        os.pwrite(file, os.urandom(SIZE), 0)
        if on == "direct":
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        volume = rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(file, SIZE, **how), 0)], block_min=how.get("align", 1))
        if on == "logged":
            open_log(rig, volume)
        client = rig.connect(volume, SIZE, style)
        found = Lane(rig, client, file)
        if on in CACHES:
            rig.wait(rig.plane.cache_volume(volume, CachePolicy(CacheMode.READ)))
            random.Random(1).shuffle(found.blocks)
            found.walks = on == "churn"
        warm = partial(repeat, 20, partial(found.batch, w.CMD_READ, READS))
        found.thread = counts.busiest_thread(os.getpid(), mine, warm)
        yield found
        os.close(file)


def open_log(rig: Rig, volume: int) -> None:
    """A log from which nothing is carried meanwhile."""
    log = os.memfd_create("log")
    os.ftruncate(log, LOG)
    number = rig.fd_object(log, LOG, direct=True, align=512)
    os.close(log)
    rig.wait(rig.plane.open_log(volume, number, 0, LOG, LogPolicy(age_ms=3_600_000)))
    rig.call(rig.plane.allow_log, volume)


def repeat(times: int, what: Callable[[], None]) -> None:
    for _ in range(times):
        what()


def limits_of(found: Lane, on: str, command: int) -> Limits:
    """By what the file system can do: asked, not assumed."""
    if on in LIMITS:
        return LIMITS[on]
    if command == w.CMD_WRITE:
        return LIMITS[{"disk": "write", "direct": "direct", "tmpfs": "store"}[on]]
    if on == "tmpfs":
        return LIMITS["view"]
    return LIMITS["resident" if found.answers_at_once else "ring"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tools")
    generators.build(out)
    return out / "steps"


CASES = [
    pytest.param("disk", "simple", w.CMD_READ, READS, id="disk-read"),
    pytest.param("disk", "structured", w.CMD_READ, READS, id="disk-structured-read"),
    pytest.param("disk", "simple", w.CMD_WRITE, WRITES, id="disk-write"),
    pytest.param("direct", "simple", w.CMD_WRITE, WRITES, id="direct-write"),
    pytest.param("tmpfs", "simple", w.CMD_READ, READS, id="tmpfs-read"),
    pytest.param("tmpfs", "simple", w.CMD_WRITE, WRITES, id="tmpfs-write"),
    pytest.param("hit", "simple", w.CMD_READ, READS, id="cache-hit"),
    pytest.param("hit", "structured", w.CMD_READ, READS, id="cache-structured-hit"),
    pytest.param("churn", "simple", w.CMD_READ, READS, id="cache-churn"),
    pytest.param("logged", "simple", w.CMD_WRITE, WRITES, id="log-write"),
]


@pytest.mark.parametrize(("on", "style", "command", "count"), CASES)
def test_ring_entries_receives_and_copies(on: str, style: Style, command: int, count: int) -> None:
    with lane(on, style) as found:
        limits, spent = limits_of(found, on, command), found.spent(command, count)
        assert spent.requests == BATCHES * count
        assert spent.batches <= BATCHES * limits.receives
        assert spent.submissions <= BATCHES * limits.ring_entries + START_UP
        assert spent.copies_bytes <= BATCHES * limits.copied_bytes
        assert spent.pool_waits == 0


@pytest.mark.parametrize(("on", "style", "command", "count"), CASES)
def test_system_calls(on: str, style: Style, command: int, count: int, tmp_path: Path) -> None:
    with lane(on, style) as found:
        limits = limits_of(found, on, command)
        with counts.straced(found.thread, tmp_path / "calls", threads=False):
            repeat(BATCHES, lambda: found.batch(command, count))
        calls = counts.parse_strace((tmp_path / "calls").read_text())
        assert sum(calls.values()) <= BATCHES * limits.system_calls + START_UP, calls
        assert not calls.keys() & {"brk", "mmap", "munmap", "mremap", "madvise", "futex"}, calls


TRIES = 5
"""Batches that are counted before too many instructions are too many: who else uses the machine splits some of them."""


@pytest.mark.parametrize(("on", "style", "command", "count"), CASES)
def test_allocations_and_instructions(on: str, style: Style, command: int, count: int, steps: Path) -> None:
    with lane(on, style) as found:
        limits = limits_of(found, on, command)
        for last in reversed(range(TRIES)):
            profile = counts.stepped(steps, os.getpid(), found.thread, lambda: found.batch(command, count))
            assert "_native:nv_conn_parse" in profile.own, "another thread was watched"
            assert counts.allocations(profile) <= limits.allocations
            if limits.instructions is None or profile.instructions <= limits.instructions:
                break
            assert last, profile.own.most_common(12)
