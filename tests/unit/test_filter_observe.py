"""What a filter answers when control looks: counters as they are, sums that never go back, and bounded traces."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import nbdvvol.filter.objects as objects_module
from nbdvvol.dataplane.types import ObjectStats, TraceRecord
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.model.errors import Code
from nbdvvol.model.farm import CacheConfig
from nbdvvol.model.link import Counters, Delta, Forget, Look, Traced, TraceOrder
from tests.unit.fake_control import Session
from tests.unit.fake_plane import FakePlane
from tests.unit.filter_words import MIB, file_store, until, uuid_of, vvol
from tests.unit.test_filter_daemon import Bench

MS = 1_000_000


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    bench = Bench(folder)
    yield bench
    await bench.end()
    await bench.control.stop()
    shutil.rmtree(folder, ignore_errors=True)


async def look(session: Session, number: int = 7) -> Counters:
    await session.send(Look(id=number))
    answer = await session.next(Counters)
    assert answer.id == number
    return answer


def record(number: int, *, reactor: int = 0, **more: Any) -> TraceRecord:
    """A request that was sent as the `number`-th, 5 ms after it came."""
    at = 1 << 60 | number * MS
    moments = [at, at + MS, at + 2 * MS, at + 4 * MS, at + 5 * MS]
    values: dict[str, Any] = {"type": 0, "flags": 0, "error": 0} | more
    return TraceRecord(number, 512 * number, 512, *moments, volume=1, connection=3, reactor=reactor, **values)


def order(number: int = 1, **more: Any) -> TraceOrder:
    values: dict[str, Any] = {"uuid": uuid_of(1), "seconds": 5.0, "count": 100} | more
    return TraceOrder(id=number, **values)


async def refusal(session: Session, question: TraceOrder) -> Traced:
    await session.send(question)
    answer = await session.next(Traced)
    assert answer.id == question.id and answer.report is None
    return answer


# ---- counters ----


async def test_a_look_is_answered_with_everything_that_counts(bench: Bench) -> None:
    session = await bench.up(1, 2)
    found = (await look(session)).counters
    assert (found.host, found.tracing) == ("h1", "") and found.uptime_s >= 0
    assert [(one.vvol, one.uuid, one.epoch) for one in found.exports] == [
        ("vm1/disk1", uuid_of(1), 1),
        ("vm1/disk2", uuid_of(2), 1),
    ]
    assert [(one.reactor, one.requests) for one in found.reactors] == [(0, 1), (1, 2)]
    assert [(one.datastore, one.objects, one.faults) for one in found.datastores] == [("local", 1, 0)]
    again = (await look(session, 8)).counters
    assert again.instance == found.instance and again.uptime_s >= found.uptime_s


async def test_what_the_cache_did_is_told_of_vvols_that_have_one(bench: Bench) -> None:
    session = await bench.up(1, 2)
    cached = vvol(1, cache=CacheConfig(mode="read", ram=2 << 20))
    await session.send(Delta(revision=2, vvols={cached.uuid: cached}))
    await until(lambda: bench.plane.caches)
    found = (await look(session)).counters
    assert found.cache.bytes == 1 << 20
    one, two = found.exports
    assert two.cache is None
    assert one.cache is not None and (one.cache.mode, one.cache.hit_ratio) == ("read", 0.75)
    assert (one.cache.floor_bytes, one.cache.ram_bytes) == (1 << 20, 2 << 20)


async def test_a_failed_sync_shows_as_a_fault_of_its_datastore(bench: Bench) -> None:
    session = await bench.up(1)
    [number] = bench.plane.objects
    assert bench.plane.on_sync_failed is not None
    bench.plane.on_sync_failed(number, 5)
    assert (await look(session)).counters.datastores[0].faults == 1


async def test_a_volume_that_is_just_closed_is_left_out(bench: Bench) -> None:
    session = await bench.up(1, 2)
    bench.plane.volumes.pop(min(bench.plane.volumes))
    assert [one.vvol for one in (await look(session)).counters.exports] == ["vm1/disk2"]
    bench.plane.volumes[min(bench.plane.volumes) - 1] = bench.plane.volumes[min(bench.plane.volumes)]


async def test_a_datastores_sum_survives_the_closing_of_its_objects(tmp_path: Path) -> None:
    plane = FakePlane()
    objects = ObjectTable(plane, FaultBook(tmp_path))
    objects.farm = "farm"
    (tmp_path / "x.img").write_bytes(bytes(MIB))
    store = file_store(tmp_path / "x.img", "main")
    for round_number in (1, 2):
        held = await objects.acquire(store, "")
        plane.objects[held.number].stats = ObjectStats(reads=3, syncs=1, read_bytes=300)
        assert [(one.reads, one.objects) for one in objects.counters()] == [(3 * round_number, 1)]
        await objects.release(held)
        [left] = objects.counters()
        assert (left.datastore, left.objects) == ("main", 0)
        assert (left.reads, left.syncs, left.read_bytes) == (3 * round_number, round_number, 300 * round_number)
    objects.shutdown()


async def test_an_object_that_something_hangs_on_is_closed_when_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gave it up does not hear of it; who wants it meanwhile has it; and its sums are right all the time."""
    monkeypatch.setattr(objects_module, "AGAIN_S", 0.02)
    plane = FakePlane()
    objects = ObjectTable(plane, FaultBook(tmp_path))
    objects.farm = "farm"
    (tmp_path / "x.img").write_bytes(bytes(MIB))
    store = file_store(tmp_path / "x.img", "main")
    held = await objects.acquire(store, "")
    plane.objects[held.number].stats = ObjectStats(reads=3)
    plane.hung.add(held.number)
    await objects.release(held)
    assert [(one.reads, one.objects) for one in objects.counters()] == [(3, 1)]
    assert await objects.acquire(store, "") is held
    await objects.release(held)
    plane.hung.clear()
    await until(lambda: plane.objects == {})
    assert [(one.reads, one.objects) for one in objects.counters()] == [(3, 0)]
    objects.shutdown()


# ---- traces ----


async def test_a_trace_ends_with_enough_requests(bench: Bench) -> None:
    session = await bench.up(1)
    began = 1 << 60
    bench.plane.records = [record(number, reactor=number % 2) for number in range(10)]
    await session.send(order(count=4, every=3))
    answer = await session.next(Traced)
    assert answer.error == "" and answer.report is not None
    report = answer.report
    assert (report.ended, report.every, report.dropped) == ("count", 3, 0)
    assert [one.offset // 512 for one in report.requests] == [0, 1, 2, 3], "the first that were sent, of all reactors"
    one = report.requests[1]
    assert (one.command, one.flags, one.error, one.connection, one.reactor, one.cookie) == ("read", [], 0, 3, 1, 1)
    gaps = one.parsed_ns - one.received_ns, one.submitted_ns - one.parsed_ns, one.completed_ns - one.submitted_ns
    assert gaps == (MS, MS, 2 * MS) and one.sent_ns - one.completed_ns == MS
    assert one.received_ns < began, "moments count from the beginning of the trace"
    assert one.stages() == {"parse": MS, "submit": MS, "complete": 2 * MS, "send": MS, "total": 5 * MS}
    assert f"trace {max(bench.plane.volumes)} every 3" in bench.plane.log and bench.plane.log[-1] == "trace ends"


async def test_a_trace_ends_when_its_time_is_over(bench: Bench) -> None:
    session = await bench.up(1)
    bench.plane.records = [record(1, type=1, flags=1 | 1 << 9), record(0, type=77, error=22)]
    bench.plane.dropped = 4
    await session.send(order(seconds=0.05))
    report = (await session.next(Traced)).report
    assert report is not None
    assert (report.ended, report.dropped) == ("seconds", 8) and report.seconds >= 0.05
    words = [(one.command, one.flags, one.error) for one in report.requests]
    assert words == [("command-77", [], 22), ("write", ["fua", "0x200"], 0)], "in the order of their arrival"


async def test_a_trace_ends_when_its_volume_is_closed(bench: Bench) -> None:
    session = await bench.up(1)
    bench.plane.records = [record(0)]
    await session.send(order())
    await until(lambda: bench.plane.traced)
    assert (await look(session)).counters.tracing == uuid_of(1)
    await session.send(Delta(revision=6, vvols={uuid_of(1): None}))
    report = (await session.next(Traced)).report
    assert report is not None and report.ended == "closed" and len(report.requests) == 1
    assert (await look(session)).counters.tracing == ""


async def test_one_trace_at_a_time(bench: Bench) -> None:
    session = await bench.up(1, 2)
    await session.send(order(1))
    await until(lambda: bench.plane.traced)
    busy = await refusal(session, order(2, uuid=uuid_of(2)))
    assert busy.code == Code.BUSY and "another trace" in busy.error and busy.hint
    await session.send(Forget(id=1))
    await until(lambda: not bench.plane.traced)
    bench.plane.records = [record(0)]
    await session.send(order(3, uuid=uuid_of(2), count=1))
    assert (await session.next(Traced)).id == 3, "nobody hears of the trace that was forgotten"


@pytest.mark.parametrize("number", [2, 9])
async def test_what_is_not_served_is_not_traced(bench: Bench, number: int) -> None:
    session = await bench.up(1)
    told = await refusal(session, order(uuid=uuid_of(number)))
    assert told.code == Code.UNAVAILABLE and "not served" in told.error
    assert not bench.plane.traced


async def test_why_it_is_not_served_is_told(bench: Bench) -> None:
    bench.plane.fail_open = "the map is odd"
    session = await bench.up(1)
    assert "the map is odd" in (await refusal(session, order())).error


async def test_a_lost_link_ends_the_trace(bench: Bench) -> None:
    session = await bench.up(1)
    await session.send(order(seconds=60))
    await until(lambda: bench.plane.traced)
    await session.close()
    await until(lambda: not bench.plane.traced)


async def test_a_clean_stop_does_not_wait_for_a_trace(bench: Bench) -> None:
    session = await bench.up(1)
    await session.send(order(seconds=60))
    await until(lambda: bench.plane.traced)
    async with asyncio.timeout(5):
        await bench.end()
    assert bench.plane.closed and not bench.plane.traced


async def test_the_plane_may_refuse(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await bench.up(1)

    def refuse(volume: int, every: int) -> int:
        raise OSError(2, f"volume {volume} is not open")

    monkeypatch.setattr(bench.plane, "begin_trace", refuse)
    told = await refusal(session, order())
    assert told.code == Code.INTERNAL and "is not open" in told.error
