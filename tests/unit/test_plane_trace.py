"""Looking on: what the data plane counts of volumes, objects and reactors, and traces of single requests."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Literal

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import Run, RunState, TraceRecord, VolumeStats
from tests.lib import nbdwords as w
from tests.lib.rawio import NbdError, Request
from tests.unit.plane_rig import Client, Rig, eventually, rig, running

__all__ = ["rig"]
KIB = 1024
SIZE = 1 << 20
RING = 16384
"""NV_TRACE_RING of native/include/limits.h."""


# ---- counters ----


Where = Literal["disk", "memory"]
BOTH = pytest.mark.parametrize("where", ["disk", "memory"])


def an_object(rig: Rig, where: Where, size: int) -> int:
    """A file on disk, or one in memory, whose bytes the data plane sends and stores without the ring."""
    if where == "disk":
        return rig.file_object(size)
    fd = os.memfd_create("disk")
    try:
        os.pwrite(fd, bytes(size), 0)
        return rig.fd_object(fd, size)
    finally:
        os.close(fd)


def settled(rig: Rig, volume: int) -> VolumeStats:
    """Counters once nothing is in flight: a read that was sent from memory counts just after its reply has gone."""
    eventually("nothing is in flight", lambda: rig.stats(volume).in_flight == 0)
    return rig.stats(volume)


@BOTH
def test_volume_and_object_count_what_was_asked_of_them(rig: Rig, where: Where) -> None:
    obj = an_object(rig, where, 2 * SIZE)
    volume = rig.volume(2 * SIZE, [Run(0, SIZE, obj, 0), Run(SIZE, SIZE, obj, SIZE)])
    other = rig.volume()
    clients = [rig.connect(volume, 2 * SIZE, style) for style in ("simple", "structured", "extended")]  # both reactors
    for client in clients:
        for _ in range(5):
            client.write(0, bytes(4 * KIB))
        client.read(8 * KIB, 12 * KIB)
        client.read(SIZE - 512, KIB)  # crosses the runs: two pieces of one request
        client.zero(64 * KIB, 32 * KIB)
        client.trim(64 * KIB, 32 * KIB)
        client.flush()
        with pytest.raises(NbdError):
            client.read(2 * SIZE, 512)
    stats = settled(rig, volume)
    assert (stats.reads, stats.writes, stats.zeroes, stats.trims, stats.flushes) == (6, 15, 3, 3, 3)
    assert (stats.read_bytes, stats.write_bytes) == (3 * 13 * KIB, 15 * 4 * KIB)
    assert (stats.errors, stats.others, stats.in_flight, stats.connections) == (3, 0, 0, 3)
    below = rig.call(rig.plane.object_stats, obj)
    assert (below.reads, below.writes, below.zeroes, below.trims, below.syncs) == (9, 15, 3, 3, 3)
    assert (below.read_bytes, below.write_bytes, below.errors) == (3 * 13 * KIB, 15 * 4 * KIB, 0)
    assert rig.stats(other).writes == 0
    assert sum(one.requests for one in rig.call(rig.plane.reactor_stats)) == 3 * 11


def test_jobs_count_on_the_object_and_on_no_volume(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.volume(SIZE, [Run(0, SIZE, obj, 0)])
    rig.wait(rig.plane.write(obj, 0, bytes(KIB)))
    rig.wait(rig.plane.read(obj, 0, KIB))
    below = rig.call(rig.plane.object_stats, obj)
    assert (below.reads, below.writes, below.syncs, below.read_bytes, below.write_bytes) == (1, 1, 1, KIB, KIB)
    assert rig.stats(volume).writes == 0


def test_storage_that_is_not_asked_counts_nothing(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.volume(2 * SIZE, [Run(0, SIZE, obj, 0), Run(SIZE, SIZE, 0, 0, RunState.ZERO)])
    client = rig.connect(volume, 2 * SIZE)
    assert client.read(SIZE, KIB) == bytes(KIB)
    client.trim(1, 100)  # shrinks to nothing
    assert settled(rig, volume).reads == 1 and rig.stats(volume).trims == 1
    below = rig.call(rig.plane.object_stats, obj)
    assert (below.reads, below.trims) == (0, 0)


def test_errors_of_the_storage_count(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.volume(SIZE, [Run(0, SIZE, obj, 0)])
    client = rig.connect(volume)
    rig.path("disk").write_bytes(b"")  # the object ends before the map does
    with pytest.raises(NbdError):
        client.read(0, KIB)
    below = rig.call(rig.plane.object_stats, obj)
    assert (below.reads, below.read_bytes, below.errors) == (0, 0, 1)
    assert (rig.stats(volume).reads, rig.stats(volume).read_bytes, rig.stats(volume).errors) == (1, 0, 1)


def test_an_object_that_is_not_open_has_no_counters(rig: Rig) -> None:
    with pytest.raises(PlaneError, match="object 7 is not open"):
        rig.call(rig.plane.object_stats, 7)


# ---- traces ----


class Trace:
    """A trace of one volume, with everything read so far."""

    def __init__(self, rig: Rig, volume: int, every: int = 1) -> None:
        self.rig = rig
        self.records: list[TraceRecord] = []
        self.dropped = 0
        self.began_ns = rig.call(rig.plane.begin_trace, volume, every)
        eventually("every reactor records", self.recording)

    def recording(self) -> bool:
        return all(self.rig.call(self.rig.plane.read_trace, number, 0)[1].recording for number in range(2))

    def read(self) -> list[TraceRecord]:
        """Everything so far."""
        states = []
        for number in range(2):
            found, state = self.rig.call(self.rig.plane.read_trace, number, RING)
            self.records += found
            states.append(state)
        self.dropped = sum(state.dropped for state in states)
        return self.records

    def wait(self, count: int) -> list[TraceRecord]:
        """A reply may be with the client a moment before its record is in the ring."""
        eventually(f"{count} records", lambda: len(self.read()) >= count)
        assert len(self.records) == count
        return self.records

    def end(self) -> None:
        self.rig.call(self.rig.plane.end_trace)


def ordered(record: TraceRecord) -> bool:
    moments = record.received_ns, record.parsed_ns, record.submitted_ns, record.completed_ns, record.sent_ns
    return list(moments) == sorted(moments)


@BOTH
def test_a_record_says_what_was_asked_and_answered(rig: Rig, where: Where) -> None:
    obj = an_object(rig, where, SIZE)
    volume = rig.volume(SIZE, [Run(0, SIZE, obj, 0)])
    client = rig.connect(volume, SIZE, "structured")
    before = time.monotonic_ns()
    trace = Trace(rig, volume)
    calls: list[tuple[int, Callable[[], object], tuple[int, int, int, int, int]]] = [
        (1, lambda: client.write(4096, bytes(8192)), (w.CMD_WRITE, 0, 4096, 8192, 0)),
        (2, lambda: client.write(0, bytes(512), flags=w.CMD_FLAG_FUA), (w.CMD_WRITE, w.CMD_FLAG_FUA, 0, 512, 0)),
        (3, lambda: client.read(4096, 512), (w.CMD_READ, 0, 4096, 512, 0)),
        (4, lambda: client.write(0, bytes(200 * KIB)), (w.CMD_WRITE, 0, 0, 200 * KIB, 0)),
        (5, client.flush, (w.CMD_FLUSH, 0, 0, 0, 0)),
        (6, lambda: client.status(0, SIZE), (w.CMD_BLOCK_STATUS, 0, 0, SIZE, 0)),
        (7, lambda: client.trim(0, 4096), (w.CMD_TRIM, 0, 0, 4096, 0)),
        (8, lambda: client.zero(0, 4096), (w.CMD_WRITE_ZEROES, 0, 0, 4096, 0)),
        (9, lambda: client.call(w.CMD_READ, SIZE, 512), (w.CMD_READ, 0, SIZE, 512, w.EINVAL)),
        (10, lambda: client.call(w.CMD_WRITE, SIZE, 3, payload=b"abc"), (w.CMD_WRITE, 0, SIZE, 3, w.ENOSPC)),
    ]
    for count, call, expected in calls:
        call()
        record = trace.wait(count)[-1]
        assert (record.type, record.flags, record.offset, record.length, record.error) == expected
        assert ordered(record), record
        assert before <= trace.began_ns <= record.received_ns and record.sent_ns <= time.monotonic_ns()
    assert {record.volume for record in trace.records} == {volume}
    assert len({(record.connection, record.reactor) for record in trace.records}) == 1
    assert [record.cookie for record in trace.records] == list(range(0x1000, 0x1000 + len(calls)))
    refused = trace.records[8]
    assert refused.submitted_ns == refused.completed_ns, "the storage was never asked"
    starts = [record.parsed_ns for record in trace.records]
    assert starts == sorted(starts)
    trace.end()


def test_a_batch_shares_the_moment_of_its_arrival(rig: Rig) -> None:
    volume = rig.volume()
    client = rig.connect(volume)
    trace = Trace(rig, volume)
    headers = [client.header(Request(w.CMD_READ, 0, n * 512, 512), 0x9000 + n, payload=False) for n in range(16)]
    client.stream.send(b"".join(headers))  # one write on a unix socket arrives as one
    records = trace.wait(16)
    assert len({record.received_ns for record in records}) == 1
    parsed = sorted(record.parsed_ns for record in records)
    assert sorted(record.cookie for record in records) == [0x9000 + n for n in range(16)]
    assert parsed[0] >= records[0].received_ns
    trace.end()


def test_only_the_volume_and_the_time_of_the_trace_are_recorded(rig: Rig) -> None:
    volume, other = rig.volume(), rig.volume()
    clients = [rig.connect(volume), rig.connect(volume)]  # one on each reactor
    stranger = rig.connect(other)
    clients[0].read(0, 512)
    trace = Trace(rig, volume)
    for _ in range(3):
        stranger.read(0, 512)
        clients[0].read(0, 512)
        clients[1].write(0, bytes(512))
    records = trace.wait(6)
    assert {record.volume for record in records} == {volume}
    assert {record.reactor for record in records} == {0, 1}
    trace.end()
    with pytest.raises(PlaneError, match="nothing is being traced"):
        trace.read()
    with pytest.raises(PlaneError, match="nothing is being traced"):
        trace.end()
    clients[0].read(0, 512)
    again = Trace(rig, other)
    clients[0].read(0, 512)
    stranger.read(1024, 512)
    assert [record.offset for record in again.wait(1)] == [1024]
    again.end()


def test_requests_in_flight_at_the_switch_are_left_out(rig: Rig) -> None:
    """A request that was parsed before the trace began has no whole record."""
    volume = rig.volume()
    client = rig.connect(volume)
    cookie = client.send(w.CMD_WRITE, 0, 200 * KIB)  # its payload is owed
    eventually("the header was parsed", lambda: sum(s.requests for s in rig.call(rig.plane.reactor_stats)) == 1)
    trace = Trace(rig, volume)
    client.stream.send(bytes(200 * KIB))
    client.wait(cookie).check()
    client.read(0, 512)
    assert [record.type for record in trace.wait(1)] == [w.CMD_READ]
    trace.end()


def test_one_of_so_many(rig: Rig) -> None:
    volume = rig.volume()
    client = rig.connect(volume)
    trace = Trace(rig, volume, every=3)
    for number in range(10):
        client.read(512 * number, 512)
    assert [record.offset // 512 for record in trace.wait(4)] == [0, 3, 6, 9]
    trace.end()


def test_one_trace_at_a_time(rig: Rig) -> None:
    volume, other = rig.volume(), rig.volume()
    trace = Trace(rig, volume)
    with pytest.raises(PlaneError, match=f"volume {volume} is being traced") as told:
        rig.call(rig.plane.begin_trace, other)
    assert told.value.errno == errno.EBUSY
    trace.end()
    Trace(rig, other).end()


@pytest.mark.parametrize(("volume", "every", "says"), [(99, 1, "not open"), (1, 0, "1.."), (1, 1_000_001, "1..")])
def test_what_cannot_be_traced(rig: Rig, volume: int, every: int, says: str) -> None:
    rig.volume()
    with pytest.raises(PlaneError, match=says):
        rig.call(rig.plane.begin_trace, volume, every)
    with pytest.raises(PlaneError, match="nothing is being traced"):
        rig.call(rig.plane.end_trace)


def test_a_full_ring_drops_and_counts_and_nobody_waits(rig: Rig) -> None:
    volume = rig.volume()
    client = rig.connect(volume)
    trace = Trace(rig, volume)
    flood(client, RING + 1000)
    eventually("all that came is in the ring or counted", lambda: dropped(rig) == 1000)
    records = trace.read()
    assert len({record.cookie for record in records}) == len(records) == RING
    sent = [record.sent_ns for record in records]
    assert sent == sorted(sent)
    client.read(0, 512)
    trace.wait(RING + 1)  # there is room again
    assert trace.dropped == 1000
    trace.end()
    fresh = Trace(rig, volume)
    client.read(0, 512)
    fresh.wait(1)
    assert fresh.dropped == 0, "the next trace counts anew"
    fresh.end()


def dropped(rig: Rig) -> int:
    return sum(rig.call(rig.plane.read_trace, number, 0)[1].dropped for number in range(2))


def flood(client: Client, count: int) -> None:
    for first in range(0, count, 64):
        cookies = [client.send(w.CMD_FLUSH) for _ in range(min(64, count - first))]
        for cookie in cookies:
            client.wait(cookie).check()


def test_a_trace_survives_its_volume_and_its_plane_ends_with_it() -> None:
    with running(reactors=2) as rig:
        volume = rig.volume()
        client = rig.connect(volume)
        trace = Trace(rig, volume)
        client.read(0, 512)
        trace.wait(1)
        rig.wait(rig.plane.close_volume(volume))
        assert len(trace.read()) == 1
        trace.end()
        other = rig.volume()
        Trace(rig, other)  # never ended
