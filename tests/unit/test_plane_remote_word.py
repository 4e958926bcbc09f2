"""A remote server's word counts while that server lives, covers what it says, and its errors are told once."""

from __future__ import annotations

import errno
import threading

from tests.lib import nbdwords as w
from tests.lib.fakeserver import ALL_FLAGS, Asked, FakeServer, Wire
from tests.unit.plane_rig import Client, Rig, eventually, rig, running
from tests.unit.remote_rig import Remote
from tests.unit.test_plane_remote import served, servers
from tests.unit.test_plane_remote_loss import fails

__all__ = ["rig", "servers"]
SIZE = 16 << 20
WITHOUT_FUA = ALL_FLAGS & ~w.TFLAG_SEND_FUA


class Early:
    """Answers the first plain WRITE of a gathered send as soon as it has it, then reads no more until it is cut."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.cut = threading.Event()
        self.go = threading.Event()
        self.first: Asked | None = None

    def __call__(self, server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if wire is not server.wires[0] or self.answered.is_set():
            return None
        if asked.command == w.CMD_READ and asked.offset:
            self.go.wait(20)
            return None
        if asked.command == w.CMD_READ:
            return []  # a probe: silence
        if asked.command != w.CMD_WRITE or asked.flags & w.CMD_FLAG_FUA:
            return None
        self.first = asked
        server.bytes[asked.offset : asked.offset + asked.length] = asked.payload
        wire.send(wire.ok(asked))
        self.answered.set()
        self.cut.wait(20)
        wire.close()
        return []


def early_answer(rig: Rig, server: FakeServer, early: Early, remote: Remote) -> tuple[Client, list[tuple[Client, int]]]:
    """A FUA write that fills the socket; behind it in one send a small write, answered at once, and a large one."""
    volume = remote.volume()
    client = rig.connect(volume, SIZE, timeout_s=20)
    others = [rig.connect(volume, SIZE, timeout_s=20) for _ in range(3)]
    writes = ((1 << 20, 8 << 20, w.CMD_FLAG_FUA), (0, 4096, 0), (10 << 20, 6 << 20, 0))
    client.send(w.CMD_READ, 8 << 20, 512)
    eventually("the read is with the server", lambda: server.of(w.CMD_READ))
    cookies = []
    for number, (one, (offset, length, flags)) in enumerate(zip(others, writes, strict=True)):
        cookies.append((one, one.send(w.CMD_WRITE, offset, length, flags=flags, payload=bytes([65 + number]) * length)))
        eventually("it is asked", lambda number=number: remote.stats.in_flight >= number + 2)
    early.go.set()
    assert early.answered.wait(20)
    return client, cookies


def test_what_a_dead_server_answered_is_asked_of_the_next_one(servers: list[FakeServer]) -> None:
    with running(reactors=1) as rig:
        early = Early()
        old = served(servers, size=SIZE, handler=early)
        remote = Remote(rig, old)
        client, cookies = early_answer(rig, old, early, remote)
        early.cut.set()
        remote.ends[0].result(10)
        new = served(servers, size=SIZE)
        remote.server = new
        remote.link()
        for one, cookie in cookies:
            one.wait(cookie).check()
        client.flush()
        assert early.first is not None
        at, length = early.first.offset, early.first.length
        assert new.durable[at : at + length] == early.first.payload


def test_a_failed_flush_behind_a_fua_write_latches(rig: Rig, servers: list[FakeServer]) -> None:
    """The server, like Linux, tells of a lost write once."""
    told: list[bool] = []

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command != w.CMD_FLUSH or told:
            return None
        told.append(True)
        server.bytes[:512] = bytes(512)  # the page is dropped
        return [wire.error(asked, errno.EIO, "writeback")]

    remote = Remote(rig, served(servers, tflags=WITHOUT_FUA, handler=handler))
    client = rig.connect(remote.volume())
    client.write(0, b"A" * 512)
    fails(errno.EIO, lambda: client.write(4096, b"B" * 512, flags=w.CMD_FLAG_FUA))
    fails(errno.EIO, client.flush)


def test_a_fua_write_in_parts_starts_again_at_the_next_server(rig: Rig, servers: list[FakeServer]) -> None:
    second = threading.Event()

    def handler(_server: FakeServer, _wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == w.CMD_WRITE and asked.offset == 65536 and not second.is_set():
            second.set()
            return []
        return None

    server = served(servers, tflags=WITHOUT_FUA, payload_max=65536, handler=handler)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_WRITE, 0, 131072, flags=w.CMD_FLAG_FUA, payload=b"F" * 131072)
    assert second.wait(10)
    server.reboot()
    remote.ends[0].result(10)
    remote.link()
    assert client.wait(cookie).error or server.durable[:131072] == b"F" * 131072


def test_one_link_serves_where_a_flush_covers_one(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers, tflags=ALL_FLAGS & ~w.TFLAG_CAN_MULTI_CONN)
    remote = Remote(rig, server, links=2)
    client = rig.connect(remote.volume())
    for block in range(64):
        client.write(block * 512, b"x" * 512)
    client.flush()
    assert remote.stats.links == 1
    assert server.durable[: 64 * 512] == b"x" * (64 * 512)
    assert w.CMD_READ not in [asked.command for asked in server.asked], "a sign of life would let nobody in"


def test_a_flush_with_nobody_there_fails_and_latches_nothing(rig: Rig, servers: list[FakeServer]) -> None:
    remote = Remote(rig, served(servers), links=0)
    client = rig.connect(remote.volume())
    rig.call(rig.plane.give_up_remote, remote.object, yes=True)
    fails(errno.EIO, client.flush)
    remote.link()
    eventually("it serves", lambda: remote.stats.links == 1)
    assert not remote.failed
    client.write(0, b"x" * 512)
    client.flush()
