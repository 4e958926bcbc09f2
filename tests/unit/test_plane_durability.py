"""FLUSH and FUA: what is synced, how syncs are shared, and how a failed one latches.

Counting needs no hooks: /dev/null takes writes and refuses every sync (EINVAL), a regular file takes both."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator

import pytest

from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.lib.rawio import NbdError
from tests.unit.plane_rig import Client, Rig, eventually, rig

__all__ = ["rig"]
SIZE = 1 << 20


@pytest.fixture
def bad_object(rig: Rig) -> Iterator[int]:
    """An object whose syncs fail."""
    fd = os.open("/dev/null", os.O_RDWR)
    yield rig.fd_object(fd, SIZE)
    os.close(fd)


def failed(client: Client, command: int, *args: int, flags: int = 0, payload: bytes | None = None) -> bool:
    answer = client.call(command, *args, flags=flags, payload=payload)
    assert answer.error in (0, errno.EIO)
    return answer.error == errno.EIO


def test_the_first_flush_syncs_even_without_writes(rig: Rig, bad_object: int) -> None:
    """An earlier process may have been killed between its writes and their sync."""
    client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, bad_object, 0)]), SIZE)
    assert failed(client, w.CMD_FLUSH)


def test_a_failed_sync_latches_for_every_volume_until_cleared(rig: Rig, bad_object: int) -> None:
    told: list[tuple[int, int]] = []
    rig.plane.on_sync_failed = lambda obj, error: told.append((obj, error))
    first = rig.connect(rig.volume(SIZE // 2, [Run(0, SIZE // 2, bad_object, 0)]), SIZE // 2)
    second = rig.connect(rig.volume(SIZE // 2, [Run(0, SIZE // 2, bad_object, SIZE // 2)]), SIZE // 2)
    first.write(0, b"x")
    assert failed(first, w.CMD_FLUSH)
    for client in (first, second):
        assert failed(client, w.CMD_FLUSH), "it does not come back clean"
        assert failed(client, w.CMD_WRITE, 0, 1, flags=w.CMD_FLAG_FUA, payload=b"x")
        client.write(0, b"plain writes go on")
    eventually("the event", lambda: told)
    assert told == [(bad_object, errno.EINVAL)], "told once"
    rig.call(rig.plane.clear_fault, bad_object)
    assert failed(first, w.CMD_FLUSH), "cleared means: tried again"
    eventually("the second event", lambda: len(told) == 2)


def test_a_fault_of_an_earlier_process_is_latched_again(rig: Rig) -> None:
    told: list[tuple[int, int]] = []
    rig.plane.on_sync_failed = lambda obj, error: told.append((obj, error))
    obj = rig.file_object(SIZE)
    client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, obj, 0)]), SIZE)
    client.write(0, b"x")
    client.flush()
    rig.call(rig.plane.latch_fault, obj)
    for _ in range(2):
        assert failed(client, w.CMD_FLUSH)
        assert failed(client, w.CMD_WRITE, 0, 1, flags=w.CMD_FLAG_FUA, payload=b"x")
    client.write(0, b"plain writes go on")
    rig.call(rig.plane.clear_fault, obj)
    client.flush()
    assert told == [], "nobody has to be told what everybody knows"
    with pytest.raises(OSError, match="not open"):
        rig.call(rig.plane.latch_fault, 4711)


def test_a_failed_durable_write_latches_too(rig: Rig) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    obj = rig.fd_object(fd, SIZE)
    os.close(fd)
    client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, obj, 0)]), SIZE)
    with pytest.raises(NbdError) as caught:
        client.write(0, b"x")
    assert caught.value.error == errno.ENOSPC
    with pytest.raises(NbdError):
        client.write(0, b"x", flags=w.CMD_FLAG_FUA)
    assert failed(client, w.CMD_FLUSH)


def test_a_write_beyond_the_largest_file_is_no_space(rig: Rig) -> None:
    client = rig.connect(rig.volume(SIZE), SIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))  # the kernel says EFBIG
    try:
        for flags in (0, w.CMD_FLAG_FUA):
            answer = client.call(w.CMD_WRITE, SIZE // 2, 4096, flags=flags, payload=bytes(4096))
            assert answer.error == errno.ENOSPC
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    client.write(0, b"x")


@pytest.mark.parametrize("command", [w.CMD_TRIM, w.CMD_WRITE_ZEROES])
def test_trims_and_zeroes_with_fua_are_synced(rig: Rig, bad_object: int, command: int) -> None:
    client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, bad_object, 0)]), SIZE)
    assert failed(client, command, 0, 4096, flags=w.CMD_FLAG_FUA)


def test_a_flush_covers_every_object_of_the_volume(rig: Rig, bad_object: int) -> None:
    good = rig.file_object(SIZE)
    half = SIZE // 2
    client = rig.connect(rig.volume(SIZE, [Run(0, half, good, 0), Run(half, half, bad_object, 0)]), SIZE)
    client.write(0, b"good")
    assert failed(client, w.CMD_FLUSH), "the other half could not be synced"


def syncs(rig: Rig) -> int:
    return sum(one.submissions for one in rig.call(rig.plane.reactor_stats))


def test_flushes_of_many_connections_share_syncs(rig: Rig) -> None:
    """200 rounds of 8 clients that write and flush at once need far fewer syncs than flushes."""
    volume = rig.volume(SIZE)
    clients = [rig.connect(volume, SIZE) for _ in range(8)]
    clients[0].write(0, b"warm")
    clients[0].flush()
    idle = syncs(rig)
    rounds = 30
    for _ in range(rounds):
        clients[0].write(0, b"x")
        cookies = [one.send(w.CMD_FLUSH) for one in clients]
        for one, cookie in zip(clients, cookies, strict=True):
            one.wait(cookie).check()
    # Each round is 9 requests, each with a receive and a send; what is left over are syncs and one write.
    flushing = syncs(rig) - idle - rounds * 9 * 2
    assert flushing <= rounds * 5, f"{flushing} more submissions for {rounds * 8} flushes"


def test_a_flush_covers_writes_answered_on_other_connections_and_reactors(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    writer, flusher = rig.connect(volume, SIZE), rig.connect(volume, SIZE)
    flusher.flush()
    for write in (lambda: writer.write(0, b"dirty"), lambda: writer.trim(0, 4096), lambda: writer.zero(0, 4096)):
        write()
        before = syncs(rig)
        flusher.flush()
        assert syncs(rig) - before >= 3, "a receive, a send, and a sync"
        before = syncs(rig)
        flusher.flush()
        assert syncs(rig) - before <= 2


def test_flush_after_flush_without_a_write_is_free(rig: Rig) -> None:
    client = rig.connect(rig.volume(SIZE), SIZE)
    client.write(0, b"x")
    client.flush()
    before = syncs(rig)
    for _ in range(50):
        client.flush()
    assert syncs(rig) - before <= 101, "a receive and a send each, no sync"


def test_flushes_under_parallel_writes(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    stop = threading.Event()

    def write(client: Client, seed: int) -> None:
        while not stop.is_set():
            client.write(seed * 4096, os.urandom(4096))

    clients = [rig.connect(volume, SIZE) for _ in range(3)]
    threads = [threading.Thread(target=write, args=(one, i)) for i, one in enumerate(clients[:2])]
    for thread in threads:
        thread.start()
    for _ in range(50):
        clients[2].flush()
    stop.set()
    for thread in threads:
        thread.join(10)
    assert rig.stats(volume).errors == 0
