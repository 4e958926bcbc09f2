"""What must not be said or done any more: durability behind a cleared fault, and writes that were given up."""

from __future__ import annotations

import errno

import pytest

from nbdvvol.dataplane.log import LogPolicy
from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.lib.fakeserver import Asked, FakeServer, Wire
from tests.unit.plane_rig import Client, Rig, eventually, rig
from tests.unit.remote_rig import Remote
from tests.unit.test_plane_remote import served, servers
from tests.unit.test_plane_remote_loss import Held, fails

__all__ = ["rig", "servers"]
SLOTS = 256
"""Requests of a connection that are parsed and not answered yet (limits.h)."""


class Lossy:
    """A server's handler: the first change of the one kind at 0 reaches its cache and is not answered yet, the first
    FLUSH drops what is in the cache, like Linux after a failed write-back, and fails.
    """

    def __init__(self, command: int) -> None:
        self.command = command
        self.kept: list[tuple[Wire, Asked]] = []
        self.flushes = 0

    def __call__(self, server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == self.command and asked.offset == 0 and not self.kept:
            server.bytes[: asked.length] = asked.payload or bytes(asked.length)
            self.kept.append((wire, asked))
            return []
        if asked.command != w.CMD_FLUSH:
            return None
        self.flushes += 1
        if self.flushes > 1:
            return None
        server.bytes[:] = server.durable
        return [wire.error(asked, errno.EIO, "writeback")]

    def loses_it(self, remote: Remote, neighbour: Client) -> None:
        """Another client's FLUSH loses the change, the operator clears that, and then the change is answered."""
        eventually("it is with the server", lambda: self.kept)
        neighbour.write(8192, b"B" * 512)
        fails(errno.EIO, neighbour.flush)
        remote.rig.call(remote.rig.plane.clear_fault, remote.object)
        wire, asked = self.kept[0]
        wire.send(wire.ok(asked))


@pytest.mark.parametrize("command", [w.CMD_WRITE_ZEROES, w.CMD_TRIM])
def test_fua_does_not_outlive_a_failed_sync(rig: Rig, servers: list[FakeServer], command: int) -> None:
    """The change reaches the cache, a neighbour's FLUSH loses it, the operator clears that, and then the change's own
    sync succeeds: it has nothing to write any more.
    """
    lossy = Lossy(command)
    server = served(servers, handler=lossy)
    server.bytes[:4096] = b"A" * 4096
    server.durable = bytes(server.bytes)
    remote = Remote(rig, server)
    volume = remote.volume()
    client, neighbour = rig.connect(volume), rig.connect(volume)
    cookie = client.send(command, 0, 4096, flags=w.CMD_FLAG_FUA)
    lossy.loses_it(remote, neighbour)
    assert client.wait(cookie).error == errno.EIO
    assert server.durable[:4096] == b"A" * 4096 and lossy.flushes == 2, "the server has said yes to the sync of nothing"


def test_a_batch_of_the_log_does_not_outlive_a_failed_sync(rig: Rig, servers: list[FakeServer]) -> None:
    """What is carried below is in the server's cache when another volume's FLUSH loses it, the operator clears that,
    and the log's own flush succeeds with nothing to write: the log must not take it for durable.
    """
    lossy = Lossy(w.CMD_WRITE)
    server = served(servers, handler=lossy)
    remote = Remote(rig, server)
    volume, others = remote.volume(), remote.volume()
    log = rig.file_object(8 << 20, "log")
    rig.wait(rig.plane.open_log(volume, log, 0, 8 << 20, LogPolicy(age_ms=3_600_000)))
    rig.call(rig.plane.allow_log, volume)
    client, neighbour = rig.connect(volume), rig.connect(others)
    client.write(0, b"A" * 4096)
    assert rig.call(rig.plane.log_stats, volume).logged == 1
    drained = rig.start(rig.plane.drain_log(volume))
    lossy.loses_it(remote, neighbour)
    drained.result(20)
    assert server.durable[:4096] == b"A" * 4096


def test_a_write_that_was_given_up_stays_undone_behind_its_successor(rig: Rig, servers: list[FakeServer]) -> None:
    """A client gives its connection up with a write unread, writes elsewhere and leaves: nobody is there by then who
    could have sent it again, but somebody was.
    """
    held = Held(w.CMD_READ)
    server, slow = served(servers), served(servers, handler=held)
    half = server.size
    runs = [Run(0, half, Remote(rig, server).object, 0), Run(half, half, Remote(rig, slow).object, 0)]
    volume = rig.volume(2 * half, runs, block_min=server.block)
    stalled = rig.connect(volume)
    for _ in range(SLOTS):
        stalled.send(w.CMD_READ, half, 512)
    stalled.send(w.CMD_WRITE, 0, 512, payload=b"1" * 512)
    eventually("no slot is left", lambda: rig.stats(volume).in_flight == SLOTS)
    stalled.stream.half_close()
    successor = rig.connect(volume)
    successor.write(0, b"2" * 512)
    successor.send(w.CMD_DISC, 0, 0)
    assert successor.ended().errno == 0
    held.release.set()
    for wire, asked in list(held.kept):
        for piece in slow.answer(wire, asked):
            wire.send(piece)
    assert stalled.ended().errno == errno.ECONNRESET
    assert server.bytes[:512] == b"2" * 512
