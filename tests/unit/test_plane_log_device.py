"""A write-back log on a device that really fails (tests/lib/faultfs.py, through the kernel and io_uring), before a
plain volume and before a mirror: errors of single operations, cut short, slow, hanging, gone.

What was acknowledged and can be read anywhere is kept and stays readable; what cannot is told by offset and length.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvvol.dataplane.log import LogEvent, LogEventKind, LogPolicy, LogState, LogStats, LostSpan
from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.lib.faultfs import FaultFs
from tests.unit.mirror_rig import META, MirrorRig
from tests.unit.plane_rig import Client, Rig, describe, eventually, running

SIZE = 4 << 20
LOG = 4 << 20
BLOCK = 4096
RING = 8192
"""Where the log's ring begins, behind its superblocks."""
LAZY = 3_600_000
SOON_MS = 300
"""The deadline of a log operation where a test has one hang."""


class Bad:
    """A volume whose log lies on a device that can be made to fail."""

    def __init__(self, rig: Rig, fs: FaultFs, volume: int, below: list[Path], at: int) -> None:
        self.rig, self.fs, self.volume, self.below, self.at = rig, fs, volume, below, at
        self.events: list[LogEvent] = []
        rig.plane.on_log = self.events.append

    def log(self, deadline_ms: int = 0) -> Client:
        """Open it, and a client."""
        fd = os.open(self.fs.folder / "log", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(fd, 0, LOG)
            log = self.rig.fd_object(fd, LOG, direct=True, align=BLOCK)
        finally:
            os.close(fd)
        policy = LogPolicy(age_ms=LAZY, deadline_ms=deadline_ms)
        assert self.rig.wait(self.rig.plane.open_log(self.volume, log, 0, LOG, policy)).verdict == "usable"
        self.rig.call(self.rig.plane.allow_log, self.volume)
        return self.rig.connect(self.volume, SIZE)

    def stats(self) -> LogStats:
        return self.rig.call(self.rig.plane.log_stats, self.volume)

    def lost(self) -> list[LostSpan]:
        return self.rig.call(self.rig.plane.log_lost, self.volume)

    def kinds(self) -> list[LogEventKind]:
        return [one.kind for one in self.events]

    def failed(self) -> int:
        """The errno with which it was said to have failed."""
        [event] = [one for one in self.events if one.kind is LogEventKind.FAILED]
        return event.errno

    def has(self, offset: int, data: bytes) -> bool:
        """Whether the storage has it, all legs of it."""
        return all(one.read_bytes()[self.at + offset :][: len(data)] == data for one in self.below)

    def device_offset(self, data: bytes) -> int:
        """Where the log has a block."""
        found = self.fs.files["log"].find(data, RING)
        assert found > 0 and found % BLOCK == 0
        return found

    def is_void(self) -> None:
        eventually("all of it is below, and the log void", lambda: self.stats().state is LogState.VOID)

    def ends(self) -> None:
        """It is made void, on its device if that is in time."""
        done = LogState.VOID
        eventually("it ends", lambda: self.stats().state is done or LogEventKind.NEEDS_WORD in self.kinds())
        if self.stats().state is not done:
            self.forget()

    def forget(self) -> None:
        """It cannot be made void on its device: control commits that it is never replayed."""
        eventually("control is asked", lambda: LogEventKind.NEEDS_WORD in self.kinds())
        self.rig.call(self.rig.plane.forget_log, self.volume)
        self.is_void()


@pytest.fixture(params=["plain", "mirror"])
def bad(request: pytest.FixtureRequest, fs: FaultFs, tmp_path: Path) -> Iterator[Bad]:
    if request.param == "mirror":
        mirror = MirrorRig(tmp_path)
        yield Bad(mirror, fs, mirror.serve(), mirror.files, META)
        fs.release()
        mirror.close()
        return
    with running(reactors=1) as rig:
        volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, rig.file_object(SIZE), 0)]))
        yield Bad(rig, fs, volume, [rig.path("disk")], 0)
        fs.release()


def blocks(*numbers: int) -> dict[int, bytes]:
    """Fresh bytes for these blocks, by offset."""
    return {number * BLOCK: os.urandom(BLOCK) for number in numbers}


def write(client: Client, wrote: dict[int, bytes]) -> None:
    for offset, data in wrote.items():
        client.write(offset, data)


def read_back(client: Client, wrote: dict[int, bytes]) -> None:
    assert all(client.read(offset, len(data)) == data for offset, data in wrote.items())


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_fails(bad: Bad, number: int) -> None:
    """Nothing is lost, no client hears of it, and the superblock says that the log is void."""
    client, wrote = bad.log(), blocks(1, 5)
    write(client, wrote)
    client.flush()
    bad.fs.fail("write", number, RING)
    more = blocks(2, 5)
    write(client, more)
    assert bad.failed() == number
    bad.is_void()
    client.flush()
    for offset, data in (wrote | more).items():
        assert bad.has(offset, data)
    read_back(client, wrote | more)
    assert LogEventKind.NEEDS_WORD not in bad.kinds() and bad.lost() == []


def test_a_sync_fails(bad: Bad) -> None:
    """FLUSH is answered when all it covers is durable below; what the device kept is not asked for again."""
    client, wrote = bad.log(), blocks(1, 5)
    write(client, wrote)
    bad.fs.fail("sync", errno.EIO, times=1)
    client.flush()
    assert bad.failed() == errno.EIO
    for offset, data in wrote.items():
        assert bad.has(offset, data)
    bad.is_void()
    read_back(client, wrote)


def test_what_cannot_be_read_is_told_and_nothing_else_is_missed(bad: Bad) -> None:
    client, lost, kept = bad.log(), blocks(2, 3, 700), blocks(1, 4, 5)
    write(client, lost)
    end = max(map(bad.device_offset, lost.values())) + BLOCK
    bad.fs.fail("read", errno.EIO, RING, end - RING)
    write(client, kept)
    client.flush()
    drained = bad.rig.start(bad.rig.plane.drain_log(bad.volume))
    spans = [LostSpan(2 * BLOCK, 2 * BLOCK), LostSpan(700 * BLOCK, BLOCK)]
    eventually("each is told", lambda: bad.lost() == spans)
    assert bad.stats().lost_bytes == 3 * BLOCK and LogEventKind.LOST in bad.kinds()
    eventually("the others are carried", lambda: all(bad.has(*one) for one in kept.items()))
    bad.fs.mend()
    for offset in lost:
        assert client.call(w.CMD_READ, offset, BLOCK).error == errno.EIO, "never an older version"
    assert client.call(w.CMD_FLUSH).error == errno.EIO
    read_back(client, kept)
    assert not drained.done()
    first, *others = lost
    again = {first: os.urandom(BLOCK)}
    write(client, again)
    spans[0] = LostSpan(3 * BLOCK, BLOCK)
    eventually("what is overwritten is lost no more", lambda: bad.lost() == spans)
    again |= {offset: os.urandom(BLOCK) for offset in others}
    write(client, again)
    client.flush()
    drained.result(20)
    read_back(client, again | kept)
    eventually("nothing is lost any more", lambda: bad.lost() == [])
    assert all(bad.has(*one) for one in (again | kept).items())


def test_it_is_cut_short(bad: Bad) -> None:
    """Somebody cuts the file under it: what lay behind the cut is lost and told, the rest is carried."""
    client, kept, lost = bad.log(), blocks(1, 2), blocks(8, 9, 11)
    write(client, kept)
    write(client, lost)
    os.truncate(bad.fs.folder / "log", min(map(bad.device_offset, lost.values())))
    drained = bad.rig.start(bad.rig.plane.drain_log(bad.volume))
    spans = [LostSpan(8 * BLOCK, 2 * BLOCK), LostSpan(11 * BLOCK, BLOCK)]
    eventually("each is told", lambda: bad.lost() == spans)
    eventually("the others are carried", lambda: all(bad.has(*one) for one in kept.items()))
    write(client, lost)
    client.flush()
    drained.result(20)
    read_back(client, kept | lost)


def test_it_is_gone(bad: Bad) -> None:
    """Pulled out: what it held is lost, and told to the byte; all else is served."""
    client, lost = bad.log(), blocks(3, 4, 20)
    write(client, lost)
    client.flush()
    bad.fs.gone()
    more = blocks(6)
    cookie = client.send(w.CMD_WRITE, 6 * BLOCK, BLOCK, payload=more[6 * BLOCK])
    bad.forget()
    assert client.wait(cookie).error == 0, "what was under way goes below"
    assert bad.failed() in (errno.ENOTCONN, errno.ECONNABORTED)
    eventually("each is told", lambda: bad.lost() == [LostSpan(3 * BLOCK, 2 * BLOCK), LostSpan(20 * BLOCK, BLOCK)])
    read_back(client, more)
    assert client.call(w.CMD_READ, 4 * BLOCK, BLOCK).error == errno.EIO
    assert client.call(w.CMD_FLUSH).error == errno.EIO
    write(client, lost)
    client.flush()
    read_back(client, lost | more)
    eventually("nothing is lost any more", lambda: bad.lost() == [])


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_a_slow_device_keeps_who_waits_for_it_and_nobody_else(bad: Bad, kind: str) -> None:
    """No longer than its deadline: it is slow, and serves on."""
    client, other, wrote = bad.log(), bad.rig.connect(bad.volume, SIZE), blocks(1, 2)
    write(client, wrote)
    bad.fs.hold(kind)
    more = blocks(3)
    if kind == "write":
        cookie = client.send(w.CMD_WRITE, 3 * BLOCK, BLOCK, payload=more[3 * BLOCK])
    else:
        cookie = client.send(w.CMD_FLUSH, 0, 0)
    eventually("the device is at it", lambda: bad.fs.held() == 1)
    read_back(other, wrote)
    client.stream.expect_silence(0.05)
    bad.fs.release()
    assert client.wait(cookie).error == 0
    write(client, more)
    read_back(other, wrote | more)
    assert bad.stats().state is LogState.SERVING and not bad.events


def test_what_hangs_is_given_up_at_the_deadline(bad: Bad) -> None:
    """A record that does not come back, nor the superblock after it; reads do. What comes late does no harm."""
    client, wrote, more = bad.log(SOON_MS), blocks(1, 2), blocks(2, 7)
    write(client, wrote)
    bad.fs.hold("write", "sync")
    cookies = [client.send(w.CMD_WRITE, offset, BLOCK, payload=data) for offset, data in more.items()]
    bad.forget()
    assert bad.failed() == errno.ETIMEDOUT
    assert all(client.wait(cookie).error == 0 for cookie in cookies)
    client.flush()
    read_back(client, wrote | more)
    assert all(bad.has(*one) for one in (wrote | more).items())
    bad.fs.release()
    write(client, blocks(2))
    client.flush()
    assert bad.stats().state is LogState.VOID and bad.lost() == []


def test_a_sync_that_hangs_is_given_up_at_the_deadline(bad: Bad) -> None:
    """What it should have made durable is carried meanwhile. (This file system lets no write pass a sync, so the
    superblock is not given up here: the simulator has that.)"""
    client, wrote = bad.log(SOON_MS), blocks(1, 2)
    write(client, wrote)
    bad.fs.hold("sync")
    cookie = client.send(w.CMD_FLUSH, 0, 0)
    eventually("it is below", lambda: all(bad.has(*one) for one in wrote.items()))
    assert bad.failed() == errno.ETIMEDOUT
    bad.fs.release()
    bad.ends()
    assert client.wait(cookie).error == 0
    read_back(client, wrote)


def test_a_superblock_that_hangs_is_given_up_at_the_deadline(bad: Bad) -> None:
    """It is written when a batch has been carried: nothing is missed, the log is void by control's word."""
    client, wrote = bad.log(SOON_MS), blocks(1, 2)
    write(client, wrote)
    client.flush()
    bad.fs.hold("write")
    drained = bad.rig.start(bad.rig.plane.drain_log(bad.volume))
    bad.forget()
    drained.result(20)
    assert bad.failed() == errno.ETIMEDOUT
    assert all(bad.has(*one) for one in wrote.items())
    read_back(client, wrote)
    client.flush()


def test_a_read_that_hangs_is_given_up_at_the_deadline(bad: Bad) -> None:
    """Who asked for what only the log has hears it, and never gets what is older; others go on. Nothing is lost: when
    the device answers again, all of it is carried."""
    client, other, wrote = bad.log(SOON_MS), bad.rig.connect(bad.volume, SIZE), blocks(1, 2, 9)
    write(client, wrote)
    client.flush()
    bad.fs.hold("read")
    cookies = [client.send(w.CMD_READ, offset, BLOCK) for offset in wrote]
    early, more = blocks(30, 31), blocks(40, 41)
    write(other, early)
    assert [client.wait(cookie).error for cookie in cookies] == [errno.EIO] * len(wrote)
    eventually("it is told", lambda: LogEventKind.FAILED in bad.kinds())
    assert bad.failed() == errno.ETIMEDOUT
    write(other, more)
    read_back(other, more)
    again = {9 * BLOCK: os.urandom(BLOCK)}
    assert other.call(w.CMD_READ, 2 * BLOCK, BLOCK).error == errno.EIO
    late = [client.send(w.CMD_WRITE, 9 * BLOCK, BLOCK, payload=again[9 * BLOCK]), client.send(w.CMD_FLUSH, 0, 0)]
    assert [client.wait(cookie).error for cookie in late] == [errno.EIO] * 2, "no promise beside one that waits"
    assert bad.stats().state is LogState.FAILED and bad.lost() == [] and not any(bad.has(*one) for one in wrote.items())
    bad.fs.release()
    bad.is_void()
    wrote |= early
    read_back(other, wrote | more)
    assert all(bad.has(*one) for one in wrote.items()) and LogEventKind.LOST not in bad.kinds()
    write(client, again)
    client.flush()
    read_back(other, wrote | more | again)


def test_a_write_whose_record_hangs_beside_reads_that_hang_is_answered_all_the_same(bad: Bad) -> None:
    """Until the log is void nobody knows whether it comes to be seen: its blocks are not read, nor changed."""
    client, other, wrote = bad.log(SOON_MS), bad.rig.connect(bad.volume, SIZE, "structured"), blocks(1, 2)
    write(client, wrote)
    client.flush()
    bad.fs.hold("read", "write", "sync")
    new = os.urandom(BLOCK)
    cookies = [client.send(w.CMD_WRITE, number * BLOCK, BLOCK, payload=new) for number in (2, 7)]
    assert other.call(w.CMD_READ, BLOCK, BLOCK).error == errno.EIO
    assert [client.wait(cookie).error for cookie in cookies] == [errno.EIO] * 2
    for number in (2, 7):
        assert other.call(w.CMD_READ, number * BLOCK, BLOCK).error == errno.EIO, "neither old nor new"
        cookies = [client.send(w.CMD_TRIM, number * BLOCK, BLOCK)]
        assert [client.wait(cookie).error for cookie in cookies] == [errno.EIO], "none overtakes it"
        assert other.status(number * BLOCK, BLOCK) == [(BLOCK, 0)], "no hole that may be data after a crash"
    more = blocks(8, 40)
    write(other, more)
    read_back(other, more)
    assert bad.stats().state is LogState.FAILED and bad.lost() == []
    bad.fs.release()
    bad.ends()
    read_back(other, wrote | more | {7 * BLOCK: bytes(BLOCK)})
    again = blocks(2, 7)
    write(client, again)
    client.flush()
    read_back(other, wrote | more | again)


def test_nothing_is_promised_at_the_end_behind_a_write_that_may_yet_be_in_the_log(bad: Bad) -> None:
    """It waits for its turn behind one whose record is on its way, and would be lost under that when a log is read."""
    client, other = bad.log(SOON_MS), bad.rig.connect(bad.volume, SIZE)
    bad.fs.hold("write", "sync")
    cookie = client.send(w.CMD_WRITE, 2 * BLOCK, BLOCK, payload=os.urandom(BLOCK))
    eventually("it is told", lambda: LogEventKind.FAILED in bad.kinds())
    behind = other.send(w.CMD_WRITE, 2 * BLOCK, BLOCK, payload=os.urandom(BLOCK))
    eventually("control's word is needed", lambda: LogEventKind.NEEDS_WORD in bad.kinds())
    closed = bad.rig.start(bad.rig.plane.close_volume(bad.volume))
    assert [client.wait(cookie).error, other.wait(behind).error] == [errno.ESHUTDOWN] * 2
    bad.fs.release()
    closed.result(20)


def test_carrying_does_not_wait_for_a_read_that_hangs(bad: Bad) -> None:
    """What can be read is carried meanwhile; the rest when the device answers, though its volume is drained by then."""
    client, stuck, wrote = bad.log(SOON_MS), blocks(5), blocks(900, 901)
    write(client, stuck)
    write(client, wrote)
    client.flush()
    at = bad.device_offset(stuck[5 * BLOCK])
    bad.fs.hold("read", offset=at, length=BLOCK)
    drained = bad.rig.start(bad.rig.plane.drain_log(bad.volume))
    eventually("the others are carried", lambda: all(bad.has(*one) for one in wrote.items()))
    eventually("it is told", lambda: LogEventKind.FAILED in bad.kinds())
    assert bad.failed() == errno.ETIMEDOUT and not drained.done() and not bad.has(5 * BLOCK, stuck[5 * BLOCK])
    read_back(client, wrote)
    bad.fs.release()
    drained.result(20)
    assert bad.has(5 * BLOCK, stuck[5 * BLOCK]) and bad.lost() == []
    read_back(client, stuck | wrote)


def test_who_hears_of_it_and_fails_keeps_nobody_else_from_hearing(bad: Bad) -> None:
    """An event that is not dealt with is told, and the one behind it comes: somebody waits for that."""
    client, told, failures = bad.log(), threading.Event(), list[object]()
    loop, plane, disk = bad.rig.loop, bad.rig.plane, bad.rig.file_object(SIZE, "other")

    def fails(event: LogEvent) -> None:
        raise ValueError(f"a fault in who hears of {event.kind.value}")

    async def look() -> bytes:
        told.wait(10)  # events gather meanwhile
        looking = asyncio.ensure_future(plane.read(disk, 0, BLOCK))
        await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251
        async with asyncio.timeout(10):
            return await looking

    plane.on_log = fails
    bad.rig.call(loop.set_exception_handler, lambda _, context: failures.append(context["exception"]))
    bad.fs.fail("write", errno.EIO, RING)
    looking = bad.rig.start(look())
    cookie = client.send(w.CMD_WRITE, BLOCK, BLOCK, payload=bytes(BLOCK))
    assert client.wait(cookie).error == 0, "it has gone to the storage"
    told.set()
    assert looking.result(20) == bytes(BLOCK)
    assert "LOG_FAILED" in str(failures[0])


def test_all_reads_hang_and_more_are_asked_for(bad: Bad) -> None:
    """More than there is memory for at once: all of them are answered, and again when the device is well."""
    client, wrote = bad.log(SOON_MS), blocks(*range(0, 80, 2))
    write(client, wrote)
    bad.fs.hold("read")
    cookies = [client.send(w.CMD_READ, offset, BLOCK) for offset in wrote]
    assert {client.wait(cookie).error for cookie in cookies} == {errno.EIO}
    bad.fs.release()
    bad.is_void()
    read_back(client, wrote)
