"""Connections and volumes from open to end: drains, growth, clients that stall, drip, vanish or flood."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import ConnectionParams, Run
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES, NbdError, Style
from tests.unit.plane_rig import Client, Rig, describe, eventually, rig, running

__all__ = ["rig"]
SIZE = 1 << 20


def flood_reads(client: Client, count: int, length: int) -> None:
    """Send read requests and never look at the replies."""
    client.stream.sock.settimeout(0.3)
    one = b"".join(struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, i, 0, length) for i in range(100))
    try:
        for _ in range(count // 100):
            client.stream.sock.sendall(one)
    except TimeoutError:
        pass  # pushed back, as it should be


def test_client_that_never_reads_is_pushed_back_and_harms_nobody() -> None:
    with running(reactors=1, pool_bytes=8 << 20) as rig:
        volume = rig.volume(SIZE)
        good, bad = rig.connect(volume, SIZE), [rig.connect(volume, SIZE) for _ in range(3)]
        for one in bad:
            flood_reads(one, 16_000, 65536)
        in_flight = rig.stats(volume).in_flight
        assert in_flight <= 3 * 256
        start = time.monotonic()
        for i in range(200):
            good.write(i * 4096, bytes([i]) * 4096)
            assert good.read(i * 4096, 4096) == bytes([i]) * 4096
        big = os.urandom(SIZE)
        good.write(0, big)
        assert good.read(0, SIZE) == big
        assert time.monotonic() - start < 20
        for one in bad:
            one.stream.close()
            assert one.ended().errno != 0


def test_a_stalled_client_at_its_cap_leaves_the_pool_to_others() -> None:
    """It waits for its own memory, not at the head of everybody's queue."""
    with running(reactors=1, pool_bytes=16 << 20) as rig:
        stalled = rig.connect(rig.volume(SIZE), SIZE)
        flood_reads(stalled, 4000, 1 << 20)
        good = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.file_object(SIZE, "other"), 0)]), SIZE)
        before = rig.call(rig.plane.reactor_stats)[0].pool_waits
        cookies = [good.send(w.CMD_READ, 0, 64 << 10) for _ in range(16)]
        for cookie in cookies:
            good.wait(cookie).check()
        assert rig.call(rig.plane.reactor_stats)[0].pool_waits == before, "none of its reads had to wait"


def test_16000_requests_are_answered_with_bounded_memory(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE)
    client.stream.polite = False
    count = 16_000
    requests = b"".join(struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, i, i % 1000, 512) for i in range(count))
    sender = threading.Thread(target=client.stream.send, args=(requests,))
    sender.start()
    seen = set()
    for _ in range(count):
        magic, error, cookie = struct.unpack(">IIQ", client.stream.recv(16))
        assert (magic, error) == (w.SIMPLE_REPLY_MAGIC, 0)
        client.stream.recv(512)
        seen.add(cookie)
    sender.join()
    assert len(seen) == count


def affinities() -> list[set[int]]:
    return [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]


def test_reactors_are_pinned_where_they_are_told_to_be() -> None:
    here = min(os.sched_getaffinity(0))
    with running(cpu_first=here) as pinned:
        assert {here} in affinities() or os.sched_getaffinity(0) == {here}
        client = pinned.connect(pinned.volume(), SIZE)
        client.write(0, b"x")
    with running(cpu_first=1000) as rig:  # a CPU that is not there pins nothing
        eventually("nothing is pinned", lambda: all(one == os.sched_getaffinity(0) for one in affinities()))
        rig.connect(rig.volume(), SIZE).write(0, b"x")


def test_slow_drip_of_a_payload_delays_nobody(rig: Rig) -> None:
    volume = rig.volume()
    slow, quick = rig.connect(volume, SIZE), rig.connect(volume, SIZE)
    cookie = slow.send(w.CMD_WRITE, 0, 40_000, payload=b"s" * 100)
    for i in range(40):
        slow.stream.send(b"s" * 100)
        quick.write(500_000, bytes([i]) * 10_000)
    assert quick.read(0, 4) == bytes(4), "no part of an incomplete write happens"
    slow.stream.send(b"s" * (40_000 - 4100))
    slow.wait(cookie).check()
    assert quick.read(0, 40_000) == b"s" * 40_000


def test_requests_byte_by_byte(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE)
    for byte in struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_WRITE, 9, 10, 3) + b"abc":
        client.stream.send(bytes([byte]))
    assert client.stream.recv(16) == struct.pack(">IIQ", w.SIMPLE_REPLY_MAGIC, 0, 9)
    assert client.read(9, 5) == b"\0abc\0"


@pytest.mark.parametrize("style", STYLES)
def test_half_close_answers_what_was_read(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style)
    cookies = [client.send(w.CMD_READ, i, 100_000) for i in range(20)]
    client.stream.half_close()
    for cookie in cookies:
        client.wait(cookie).check()
    assert client.stream.wait_closed() == b""
    assert client.ended().errno == 0


def test_vanishing_clients_release_everything(rig: Rig) -> None:
    volume = rig.volume()
    for i in range(60):
        client = rig.connect(volume, SIZE)
        client.stream.polite = False
        for _ in range(i % 7):
            client.send(w.CMD_READ, 0, 100_000)
            client.send(w.CMD_WRITE, 0, 20_000, payload=bytes(20_000))
        client.stream.close()
        client.ended()
    assert rig.stats(volume).connections == 0
    stats = rig.call(rig.plane.reactor_stats)
    assert [(one.connections, one.pool_free_bytes) for one in stats] == [(0, 16 << 20)] * 2
    assert rig.stats(volume).in_flight == 0


def test_tcp_connections(rig: Rig) -> None:
    volume = rig.volume()
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    client = rig.connect(volume, SIZE)
    client.stream.close()
    theirs.setblocking(False)  # as asyncio leaves it
    ending = rig.call(rig.plane.open_connection, theirs.fileno(), volume, ConnectionParams(tflags=1))
    theirs.close()
    mine.sendall(struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, 1, 0, 10))
    got = b""
    while len(got) < 26:
        got += mine.recv(26 - len(got))
    rig.wait(rig.plane.close_volume(volume))
    assert mine.recv(1) == b"", "a clean end, no reset"
    assert rig.call(ending.result).errno == errno.ESHUTDOWN
    mine.close()


# --- volumes ---


def test_close_drains_and_tells(rig: Rig) -> None:
    volume = rig.volume()
    clients = [rig.connect(volume, SIZE, style) for style in STYLES for _ in range(2)]
    cookies = [[one.send(w.CMD_WRITE, 1000 * i, 1000, payload=b"c" * 1000) for i in range(50)] for one in clients]
    closing = rig.start(rig.plane.close_volume(volume))
    for one, mine in zip(clients, cookies, strict=True):
        for cookie in mine:
            try:
                answer = one.wait(cookie)
            except Exception:
                break
            assert answer.error in (0, errno.ESHUTDOWN)
        one.stream.wait_closed()
        assert one.ended().errno in (errno.ESHUTDOWN, errno.ECONNRESET)
    closing.result(10)
    with pytest.raises(PlaneError):
        rig.connect(volume, SIZE)


def test_close_does_not_wait_for_a_client_that_never_reads(rig: Rig) -> None:
    volume = rig.volume()
    client = rig.connect(volume, SIZE)
    flood_reads(client, 4000, 65536)
    start = time.monotonic()
    rig.wait(rig.plane.close_volume(volume))
    assert 3 < time.monotonic() - start < 20, "cut after its time"


def test_destroy_is_bounded_too() -> None:
    with running(reactors=2) as rig:
        flood_reads(rig.connect(rig.volume(), SIZE), 4000, 65536)
        start = time.monotonic()
    assert time.monotonic() - start < 20


def test_growing_a_volume_under_a_connected_client(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.volume(SIZE, [Run(0, SIZE, obj, 0)])
    client = rig.connect(volume, 2 * SIZE)
    with pytest.raises(NbdError):
        client.write(SIZE, b"more")
    os.truncate(rig.path("disk"), 2 * SIZE)
    rig.call(rig.plane.set_object_size, obj, 2 * SIZE)
    bigger = describe(2 * SIZE, [Run(0, 2 * SIZE, obj, 0)], version=2, start=1)
    rig.wait(rig.plane.change_volume(volume, bigger))
    client.write(SIZE - 2, b"more")
    assert client.read(SIZE - 2, 4) == b"more"


def test_changes_under_load_lose_nothing(rig: Rig) -> None:
    """The map jumps between two layouts of the same bytes' places while clients write."""
    obj = rig.file_object(SIZE)
    layouts = [[Run(0, SIZE, obj, 0)], [Run(i, SIZE // 16, obj, i) for i in range(0, SIZE, SIZE // 16)]]
    volume = rig.volume(SIZE, layouts[0])
    clients = [rig.connect(volume, SIZE) for _ in range(2)]
    stop = threading.Event()

    def load(index: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            base = index * SIZE // 2
            clients[index].write(base, bytes([turn % 256]) * 100_000)
            assert clients[index].read(base, 100_000) == bytes([turn % 256]) * 100_000

    threads = [threading.Thread(target=load, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for version in range(2, 60):
        desc = describe(SIZE, layouts[version % 2], version=version, start=version - 1)
        rig.wait(rig.plane.change_volume(volume, desc))
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert rig.stats(volume).errors == 0


def test_stale_change_is_refused(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.volume(SIZE, [Run(0, SIZE, obj, 0)])
    with pytest.raises(PlaneError) as caught:
        rig.wait(rig.plane.change_volume(volume, describe(SIZE, [Run(0, SIZE, obj, 0)], version=9, start=8)))
    assert caught.value.errno == errno.ESTALE


def test_object_in_use_cannot_be_closed(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.volume(SIZE, [Run(0, SIZE, obj, 0)])
    with pytest.raises(PlaneError) as caught:
        rig.wait(rig.plane.close_object(obj))
    assert caught.value.errno == errno.EBUSY
    rig.wait(rig.plane.close_volume(volume))
    rig.wait(rig.plane.close_object(obj))
    with pytest.raises(PlaneError):
        rig.volume(SIZE, [Run(0, SIZE, obj, 0)])


# --- cost ---


def cpu_s() -> float:
    return sum(os.times()[:2])


def test_idle_costs_next_to_nothing(rig: Rig) -> None:
    volume = rig.volume()
    clients = [rig.connect(volume, SIZE) for _ in range(8)]
    for one in clients:
        one.write(0, b"x" * 100_000)
    time.sleep(0.6)  # bursts' memory is given back
    spent, slept = [], []
    for _ in range(3):  # the least of them: what else the process does now and then is not the plane's
        before, sleeps = cpu_s(), sum(one.sleeps for one in rig.call(rig.plane.reactor_stats))
        time.sleep(1)
        spent.append(cpu_s() - before)
        slept.append(sum(one.sleeps for one in rig.call(rig.plane.reactor_stats)) - sleeps)
    assert min(spent) < 0.05
    assert min(slept) < 20


def resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_an_idle_connection_keeps_little_memory() -> None:
    with running(reactors=1, connections_max=600) as rig:
        volume = rig.volume()
        for _ in range(20):
            rig.connect(volume, SIZE).read(0, SIZE)
        before, count = resident_kib(), 300
        for _ in range(count):
            one = rig.connect(volume, SIZE)
            one.write(0, b"m" * (64 << 10))
            assert len(one.read(0, SIZE)) == SIZE
        time.sleep(0.7)
        limit = 100 if "NBDVVOL_NATIVE" not in os.environ else 4000  # a sanitizer's own memory comes on top
        assert (resident_kib() - before) / count < limit, "64 KiB of receive memory and some bookkeeping"


def test_connection_limit() -> None:
    with running(reactors=1, connections_max=3) as rig:
        volume = rig.volume()
        for _ in range(3):
            rig.connect(volume)
        with pytest.raises(PlaneError) as caught:
            rig.connect(volume)
        assert caught.value.errno == errno.ENOSPC


def test_features_and_stats(rig: Rig) -> None:
    assert set(rig.call(rig.plane.features)) >= {"defer_taskrun", "registered_ring", "memory_locked"}
    volume = rig.volume()
    client = rig.connect(volume, SIZE)
    client.write(0, b"1234")
    client.read(0, 10)
    client.flush()
    client.trim(0, 4096)
    client.zero(0, 4096)
    stats = rig.stats(volume)
    assert (stats.reads, stats.writes, stats.flushes, stats.trims, stats.zeroes) == (1, 1, 1, 1, 1)
    assert (stats.read_bytes, stats.write_bytes, stats.errors, stats.connections) == (10, 4, 0, 1)


def test_closing_the_plane_tells_everybody_who_waits() -> None:
    with running(reactors=1) as rig:
        volume = rig.volume()
        client = rig.connect(volume, SIZE)
        obj = rig.file_object(SIZE, "meta")
        closing = rig.start(rig.plane.close())
        job = rig.start(rig.plane.sync(obj))
        closing.result(10)
        assert client.ended().errno == errno.ESHUTDOWN
        with pytest.raises(PlaneError) as caught:
            job.result(10)
        assert caught.value.errno == errno.ESHUTDOWN


def test_locked_memory_still_comes_back() -> None:
    """With everything locked a burst's payload memory is given back all the same."""
    with running(reactors=1, lock_memory=True) as rig:
        size = 32 << 20
        client = rig.connect(rig.volume(size), size)
        client.write(0, bytes(size))
        before = resident_kib()
        eventually("the pages' return", lambda: resident_kib() < before - (16 << 10))
