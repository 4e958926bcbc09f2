"""What a write-back log asks of its device and of the storage below it, counted: groups, syncs, what is carried when.

The storage is a server that answers when it is told to, so nothing here depends on how fast anything is.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator

import pytest

from nbdvvol.dataplane.log import LogPolicy, LogStats, LogVerdict
from tests.lib import nbdwords as w
from tests.lib.fakeserver import Asked, FakeServer, Wire
from tests.lib.rawio import Request
from tests.unit.plane_rig import Client, Rig, eventually, running
from tests.unit.remote_rig import Remote

BLOCK = 4096
SIZE = 16 << 20
LAZY = 3_600_000
"""An age at which nothing is carried below while a test runs, milliseconds."""
BATCH = 1024
"""Blocks that are carried before the first flush below, while nothing is known of the storage."""
RUNS = 16
"""Writes below under way at once, when the log is nearly full."""


class Storage:
    """A server that keeps what it is asked until it is let go, one command or several."""

    def __init__(self) -> None:
        self.server = FakeServer(size=SIZE, handler=self._handle)
        self.keeps: frozenset[int] = frozenset()
        self.held: list[tuple[Wire, Asked]] = []
        self._lock = threading.Lock()

    def _handle(self, _server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        with self._lock:
            if asked.command not in self.keeps:
                return None
            self.held.append((wire, asked))
            return []

    def hold(self, *commands: int) -> None:
        """Answer none of these any more."""
        with self._lock:
            self.keeps = frozenset(commands)

    def let_go(self, most: int | None = None) -> None:
        """Answer what is held, or the first few of it; all of it: hold nothing more."""
        with self._lock:
            self.keeps = self.keeps if most is not None else frozenset()
            going, self.held = self.held[:most], self.held[most:] if most is not None else []
        for wire, asked in going:
            for piece in self.server.answer(wire, asked):
                wire.send(piece)

    def batches(self) -> list[list[Asked]]:
        """The writes before each FLUSH."""
        found: list[list[Asked]] = [[]]
        for one in list(self.server.asked):
            if one.command == w.CMD_FLUSH:
                found.append([])
            elif one.command == w.CMD_WRITE:
                found[-1].append(one)
        return [one for one in found if one]


class Bench:
    """A volume on that storage with a log."""

    def __init__(self, rig: Rig, log_bytes: int, **policy: int) -> None:
        self.rig = rig
        self.storage = Storage()
        self.volume = Remote(rig, self.storage.server).volume()
        self.log = rig.file_object(log_bytes, "log", direct=True, align=512)
        wish = LogPolicy(**{"age_ms": LAZY, **policy})
        found = rig.wait(rig.plane.open_log(self.volume, self.log, 0, log_bytes, wish))
        assert found.verdict is LogVerdict.USABLE
        rig.call(rig.plane.allow_log, self.volume)
        self.client: Client = rig.connect(self.volume, SIZE)
        self.client.flush()  # the first one of a life is one of the storage, too

    def stats(self) -> LogStats:
        """How the log is."""
        return self.rig.call(self.rig.plane.log_stats, self.volume)

    def routed(self) -> int:
        """Writes that the log has taken, or let pass."""
        found = self.stats()
        return found.logged + found.bypassed

    def write_at_once(self, blocks: list[int], data: bytes) -> list[int]:
        """Writes of a block each, sent together; their cookies."""
        cookies = [0x5000 + i for i in range(len(blocks))]
        sent = b""
        for block, cookie in zip(blocks, cookies, strict=True):
            request = Request(w.CMD_WRITE, 0, block * BLOCK, BLOCK)
            self.client._asked.setdefault(cookie, []).append(request)
            sent += self.client.header(request, cookie, payload=True) + data
        self.client.stream.send(sent)
        return cookies

    def write_each(self, blocks: list[int], data: bytes) -> None:
        """One after the other, so that each is a record of its own."""
        for block in blocks:
            self.client.write(block * BLOCK, data)

    def carry(self, age_ms: int = 1) -> None:
        """What is logged is old enough from now on."""
        self.rig.call(self.rig.plane.limit_log, self.volume, LogPolicy(age_ms=age_ms, bypass_bytes=0))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running(reactors=1) as one:
        yield one


@pytest.fixture
def bench(rig: Rig, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Its log's size is the test's parameter."""
    how = dict(getattr(request, "param", {}))
    one = Bench(rig, how.pop("log", 64 << 20), **how)
    yield one
    one.storage.let_go()
    rig.wait(rig.plane.drain_log(one.volume))
    rig.wait(rig.plane.close_volume(one.volume))
    one.storage.server.close()


def test_a_flush_is_one_sync_of_the_log_and_nothing_below(bench: Bench) -> None:
    client, server = bench.client, bench.storage.server
    below, syncs = len(server.of(w.CMD_FLUSH)), bench.stats().syncs
    for count in range(1, 4):
        client.write(0, b"f" * BLOCK)
        client.flush()
        assert bench.stats().syncs == syncs + count
    client.flush()
    assert bench.stats().syncs == syncs + 3, "nothing was written since the last one"
    client.write(0, b"g" * BLOCK)
    together = b"".join(client.header(Request(w.CMD_FLUSH, 0, 0, 0), 0x100 + i, payload=False) for i in range(10))
    for i in range(10):
        client._asked[0x100 + i] = [Request(w.CMD_FLUSH, 0, 0, 0)]
    client.stream.send(together)
    for i in range(10):
        client.wait(0x100 + i).check()
    assert bench.stats().syncs == syncs + 4, "those that come together share one"
    assert len(server.of(w.CMD_FLUSH)) == below and not server.of(w.CMD_WRITE)


def test_writes_that_come_together_are_written_together(bench: Bench) -> None:
    before, count = bench.stats(), 64
    for cookie in bench.write_at_once(list(range(0, 2 * count, 2)), b"t" * BLOCK):
        bench.client.wait(cookie).check()
    after = bench.stats()
    assert after.logged - before.logged == count
    assert after.groups - before.groups <= count // 8, "a receive of 64 KiB has some 15 of them"
    assert after.syncs == before.syncs


def test_overwrites_are_merged_and_neighbours_are_one_write(bench: Bench) -> None:
    blocks, rand = list(range(256)), random.Random(5)
    for version in (b"1", b"2", b"3"):
        rand.shuffle(blocks)
        for cookie in bench.write_at_once(blocks, version * BLOCK):
            bench.client.wait(cookie).check()
    bench.rig.wait(bench.rig.plane.drain_log(bench.volume))
    assert [(one.offset, one.length) for one in bench.storage.server.of(w.CMD_WRITE)] == [(0, 1 << 20)]
    assert bench.storage.server.durable[: 1 << 20] == b"3" * (1 << 20)
    found = bench.stats()
    assert (found.destaged_bytes, found.merged_bytes) == (1 << 20, 2 << 20)


def test_what_was_written_first_is_carried_first(bench: Bench) -> None:
    """By the first version of a block that is not below yet, whatever came over it later; within a batch by place.

    On a busy machine the first batch takes long, and what comes after it goes in smaller ones."""
    step, old, new = 32 << 10, 8 << 20, 0
    for at, data in ((old, b"o"), (new, b"n"), (old, b"O")):
        for offset in range(at, at + BATCH * BLOCK, step):
            bench.client.write(offset, data * step)
    bench.rig.wait(bench.rig.plane.drain_log(bench.volume))
    first, *others = bench.storage.batches()
    assert sorted(one.offset for one in first) == list(range(old, old + BATCH * BLOCK, 1 << 20))
    assert [one.offset for batch in others for one in sorted(batch, key=lambda one: one.offset)] == list(
        range(new, new + BATCH * BLOCK, 1 << 20)
    )
    assert bench.storage.server.durable[old : old + BATCH * BLOCK] == b"O" * BATCH * BLOCK


@pytest.mark.parametrize("bench", [{"log": 4 << 20}], indirect=True)
def test_the_fuller_the_log_the_more_is_carried_at_once(bench: Bench) -> None:
    first, more = list(range(0, 200, 2)), list(range(1000, 1600, 2))
    bench.storage.hold(w.CMD_WRITE)
    bench.write_each(first, b"1" * BLOCK)
    assert bench.stats().used_bytes < 1 << 20
    bench.carry()
    eventually("one is carried", lambda: bench.storage.held)
    bench.write_each(more, b"2" * BLOCK)
    assert len(bench.storage.held) == 1, "a calm log carries one after the other"
    assert bench.stats().used_bytes > 3 << 20
    bench.storage.let_go(1)
    eventually("many are carried at once", lambda: len(bench.storage.held) == RUNS)
    assert bench.client.read(0, BLOCK) == b"1" * BLOCK


def test_a_batch_is_no_longer_than_slow_storage_carries_in_time(bench: Bench) -> None:
    """The next one is half of one that took more than 100 ms, so that there is room again sooner."""
    blocks = list(range(0, 4000, 2))
    for cookie in bench.write_at_once(blocks, b"s" * BLOCK):
        bench.client.wait(cookie).check()
    bench.storage.hold(w.CMD_WRITE)
    drained = bench.rig.start(bench.rig.plane.drain_log(bench.volume))
    eventually("it is carried", lambda: bench.storage.held)
    time.sleep(0.15)
    bench.storage.let_go()
    drained.result(20)
    sizes = [len(batch) for batch in bench.storage.batches()]
    assert sizes[:2] == [BATCH, BATCH // 2] and sum(sizes) == len(blocks)


@pytest.mark.parametrize("command", [w.CMD_WRITE, w.CMD_FLUSH])
def test_space_is_free_when_the_storage_has_flushed_what_was_carried(bench: Bench, command: int) -> None:
    bench.write_each(list(range(0, 20, 2)), b"k" * BLOCK)
    used = bench.stats().used_bytes
    bench.storage.hold(command)
    bench.carry()
    eventually("it waits", lambda: bench.storage.held)
    bench.client.flush()
    found = bench.stats()
    assert (found.used_bytes, found.dirty_bytes) == (used, 10 * BLOCK)
    bench.storage.let_go()
    eventually("its space is free", lambda: bench.stats().used_bytes == 0)
    assert bench.storage.server.durable[: 20 * BLOCK : BLOCK * 2] == b"k" * 10


@pytest.mark.parametrize("bench", [{"log": 264 << 10}], indirect=True)
def test_a_full_log_is_passed_by(bench: Bench) -> None:
    """Where it holds an older version of the block, that is written below for good, and marked as gone in the log."""
    bench.storage.hold(w.CMD_WRITE)
    logged = 0
    for block in itertools.count(0, 2):
        cookie = bench.client.send(w.CMD_WRITE, block * BLOCK, BLOCK, payload=b"p" * BLOCK)
        eventually("it is logged, or not", lambda: bench.routed() > logged)  # noqa: B023
        if bench.stats().bypassed:
            break
        bench.client.wait(cookie).check()
        logged += 1
    assert logged > 10 and bench.stats().dirty_bytes == logged * BLOCK
    eventually("storage has it", lambda: any(asked.offset == block * BLOCK for _, asked in bench.storage.held))
    [mine] = [asked for _, asked in bench.storage.held if asked.offset == block * BLOCK]
    assert not mine.flags & w.CMD_FLAG_FUA
    last = bench.client.send(w.CMD_WRITE, 2 * (logged - 1) * BLOCK, BLOCK, payload=b"q" * BLOCK)
    bench.storage.let_go()
    bench.client.wait(cookie).check()
    bench.client.wait(last).check()
    assert bench.client.read(2 * (logged - 1) * BLOCK, 3 * BLOCK) == b"q" * BLOCK + bytes(BLOCK) + b"p" * BLOCK


@pytest.mark.parametrize("bench", [{"bypass_bytes": 0}], indirect=True)
def test_a_bypass_over_what_is_logged_is_durable_below_before_it_is_gone_from_the_log(bench: Bench) -> None:
    client, server = bench.client, bench.storage.server
    client.write(0, b"a" * BLOCK)
    client.zero(0, 2 << 20)  # longer than an entry of the log
    assert [one.command for one in server.asked[-2:]] == [w.CMD_WRITE_ZEROES, w.CMD_FLUSH]
    found = bench.stats()
    assert (found.tombstones, found.dirty_bytes, found.bypassed) == (1, 0, 1)
    assert client.read(0, BLOCK) == bytes(BLOCK)
    client.zero(4 << 20, 2 << 20)
    assert server.asked[-1].command == w.CMD_WRITE_ZEROES, "nothing of it was logged"
    below = len(server.of(w.CMD_FLUSH))
    client.flush()
    assert len(server.of(w.CMD_FLUSH)) == below + 1, "FLUSH covers what went past the log"


@pytest.mark.parametrize("bench", [{"stream_bytes": 64 << 10}], indirect=True)
def test_who_writes_much_in_sequence_passes_the_log_by(bench: Bench) -> None:
    step, count = 8 << 10, 32
    for at in range(0, count * step, step):
        bench.client.write(at, b"w" * step)
    found = bench.stats()
    assert (found.logged, found.bypassed) == (8, count - 8)
    bench.write_each([3000, 100, 2000], b"r" * BLOCK)
    assert bench.stats().logged == 8 + 3, "others are logged"
    assert bench.client.read(0, count * step) == b"w" * count * step
