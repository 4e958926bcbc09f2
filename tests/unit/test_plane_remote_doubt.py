"""What nobody said is done or not: late writes, silences, requests that kill links, links that leave and owe."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import LinkParams
from tests.lib import nbdwords as w
from tests.lib.fakeserver import ALL_FLAGS, Asked, FakeServer, Wire
from tests.unit.plane_rig import Client, Rig, eventually, rig, running
from tests.unit.remote_rig import Remote
from tests.unit.test_plane_remote import served, servers
from tests.unit.test_plane_remote_loss import Held, fails

__all__ = ["rig", "servers"]
WITHOUT_FUA = ALL_FLAGS & ~w.TFLAG_SEND_FUA


def slow_write(
    rig: Rig, server: FakeServer, held: Held, other: list[Client] | None = None, **config: object
) -> tuple[Remote, Client, int]:
    """A write that the first connection's server neither carries out nor answers; its link is given up."""
    remote = Remote(rig, server, timeout_ms=250, **config)  # type: ignore[arg-type]
    volume = remote.volume()
    client = rig.connect(volume, timeout_s=20)
    if other is not None:
        other.append(rig.connect(volume, timeout_s=20))
    cookie = client.send(w.CMD_WRITE, 0, 512, payload=b"1" * 512)
    assert remote.ends[0].result(10).errno == errno.ETIMEDOUT
    held.release.set()
    remote.link()
    eventually("the new link serves, the old one drains", lambda: (remote.stats.links, remote.stats.draining) == (1, 1))
    return remote, client, cookie


def test_a_late_write_lands_before_a_newer_one(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_WRITE)
    server = served(servers, handler=held)
    others: list[Client] = []
    remote, client, cookie = slow_write(rig, server, held, others)
    other = others[0]
    newer = other.send(w.CMD_WRITE, 0, 512, payload=b"2" * 512)
    assert other.read(4096, 512) == bytes(512), "others go on"
    assert len(server.of(w.CMD_WRITE)) == 1, "neither it nor what overlaps it is sent while the old copy may land"
    wire, asked = held.kept[0]
    for piece in server.answer(wire, asked):  # the slow server does it at last
        wire.send(piece)
    client.wait(cookie).check()
    other.wait(newer).check()
    assert server.bytes[:512] == b"2" * 512 and remote.stats.draining == 0 and not remote.failed


def test_a_write_that_nobody_vouches_for_fails_and_its_place_is_closed(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_WRITE)
    server = served(servers, handler=held)
    remote, client, cookie = slow_write(rig, server, held, hold_ms=1000)
    assert client.wait(cookie).error == errno.EIO
    eventually("the fault is told", lambda: remote.failed == [(remote.object, errno.ETIMEDOUT)])
    fails(errno.EIO, lambda: client.write(0, b"2" * 1024))
    fails(errno.EIO, client.flush)
    client.write(4096, b"3" * 512)
    assert client.read(4096, 512) == b"3" * 512 and remote.stats.draining == 0
    rig.call(rig.plane.clear_fault, remote.object)  # the operator has restarted the server
    client.write(0, b"2" * 1024)
    client.flush()
    assert server.durable[:1024] == b"2" * 1024


@pytest.mark.parametrize("kind", [w.CMD_READ, w.CMD_WRITE])
def test_a_request_that_kills_every_link_fails(rig: Rig, servers: list[FakeServer], kind: int) -> None:
    """... and its neighbours, which died with it, do not."""

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == kind and asked.offset == 4096:
            wire.close()
            return []
        return None

    server = served(servers, handler=handler)
    remote = Remote(rig, server)
    volume = remote.volume()
    poison = rig.connect(volume, timeout_s=20)
    client = rig.connect(volume, timeout_s=20)
    neighbours = [client.send(w.CMD_READ, at * 512 + 65536, 512) for at in range(20)]
    cookie = poison.send(kind, 4096, 512, payload=b"x" * 512 if kind == w.CMD_WRITE else None)
    for _ in range(8):
        remote.ends[-1].result(10)
        remote.link()
    assert poison.wait(cookie).error == errno.EIO
    for one in neighbours:
        client.wait(one).check()
    eventually("the last link serves", lambda: remote.stats.links == 1)
    assert not remote.failed


def test_a_slow_server_that_goes_on_keeps_its_link(rig: Rig, servers: list[FakeServer]) -> None:
    """A queue that is longer than the time-out is no silence."""

    def handler(_server: FakeServer, _wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == w.CMD_WRITE:
            time.sleep(0.02)
        return None

    remote = Remote(rig, served(servers, handler=handler), timeout_ms=500)
    client = rig.connect(remote.volume(), timeout_s=30)
    cookies = [client.send(w.CMD_WRITE, at * 512, 512, payload=b"x" * 512) for at in range(100)]
    for cookie in cookies:
        client.wait(cookie).check()
    assert remote.stats.lost == 0


def test_a_request_that_is_passed_over_ends_its_link(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_READ)
    server = served(servers, handler=held)
    remote = Remote(rig, server, timeout_ms=250)
    volume = remote.volume()
    client, other = rig.connect(volume, timeout_s=20), rig.connect(volume, timeout_s=20)
    cookie = client.send(w.CMD_READ, 0, 512)
    others = []
    while not remote.ends[0].done():
        others.append(other.send(w.CMD_TRIM, 8192, 512))  # the last ones wait for a link
        time.sleep(0.05)
    assert remote.ends[0].result().errno == errno.ETIMEDOUT
    held.release.set()
    remote.link()
    client.wait(cookie).check()
    for one in others:
        other.wait(one).check()


def test_a_link_that_leaves_finishes_what_is_in_flight_and_flushes(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_READ)
    server = served(servers, handler=held)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    client.write(0, b"x" * 512)
    cookie = client.send(w.CMD_READ, 0, 512)
    eventually("held", lambda: held.kept)
    rig.call(remote.links[0].leave)
    wire, asked = held.kept[0]
    for piece in server.answer(wire, asked):
        wire.send(piece)
    assert client.wait(cookie).check().data == b"x" * 512
    assert remote.ends[0].result(10).errno == 0
    assert server.durable[:512] == b"x" * 512 and server.of(w.CMD_DISC) and not remote.failed
    assert remote.stats.again == 0


@pytest.mark.parametrize("links", [1, 4])
def test_closing_takes_one_time_out_at_most(servers: list[FakeServer], links: int) -> None:
    """However many links there are to a server that hangs, a request meets one of them."""
    held = Held(w.CMD_READ)
    held.release.set()
    with running(reactors=2) as rig:
        server = served(servers, handler=held)
        remote = Remote(rig, server, links=links, timeout_ms=500)
        client = rig.connect(remote.volume())
        eventually("all serve", lambda: client.read(0, 512) is not None and remote.stats.links == links)
        held.release.clear()
        client.send(w.CMD_READ, 0, 512)
        eventually("held", lambda: held.kept)
    assert len(held.kept) == 1


def test_refusals_of_durable_changes_latch_nothing(rig: Rig, servers: list[FakeServer]) -> None:
    def handler(_server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == w.CMD_TRIM:
            return [wire.error(asked, errno.EINVAL, "no FUA on TRIM")]
        return [wire.error(asked, errno.ENOSPC, "full")] if asked.command == w.CMD_WRITE and asked.offset else None

    remote = Remote(rig, served(servers, handler=handler), write_through=True)
    client = rig.connect(remote.volume())
    client.trim(0, 4096)
    fails(errno.ENOSPC, lambda: client.write(4096, b"x" * 512, flags=w.CMD_FLAG_FUA))
    client.write(0, b"y" * 512)
    client.flush()
    assert not remote.failed


def test_no_space_for_a_durable_write_may_be_the_loss_of_what_is_owed(rig: Rig, servers: list[FakeServer]) -> None:
    """Delayed allocation: the server's sync fails with ENOSPC for pages it had acknowledged, and tells of it once."""

    def handler(_server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wire.error(asked, errno.ENOSPC, "full")] if asked.flags & w.CMD_FLAG_FUA else None

    remote = Remote(rig, served(servers, handler=handler))
    client = rig.connect(remote.volume())
    client.write(0, b"owed" * 128)
    fails(errno.ENOSPC, lambda: client.write(4096, b"x" * 512, flags=w.CMD_FLAG_FUA))
    fails(errno.EIO, client.flush)


def test_a_write_lost_before_its_own_flush_begins_anew(rig: Rig, servers: list[FakeServer]) -> None:
    """Nobody had been told that it is done: no fault."""
    held = Held(w.CMD_FLUSH)
    server = served(servers, tflags=WITHOUT_FUA, handler=held)
    remote = Remote(rig, server, write_through=True)
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_WRITE, 0, 512, payload=b"x" * 512)
    eventually("its flush is there", lambda: held.kept)
    held.release.set()
    server.reboot()
    remote.ends[0].result(10)
    remote.link()
    client.wait(cookie).check()
    assert server.durable[:512] == b"x" * 512 and not remote.failed


def test_a_flush_comes_first(rig: Rig, servers: list[FakeServer]) -> None:
    """A filter that was killed may have left acknowledged writes in the server's cache."""
    server = served(servers)
    server.bytes[:512] = b"left" * 128
    remote = Remote(rig, server, flush_first=True)
    eventually("it is durable", lambda: server.durable[:512] == b"left" * 128)
    assert [one.command for one in server.asked] == [w.CMD_FLUSH] and not remote.failed


def test_another_export_is_refused(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers, block=512)
    remote = Remote(rig, server, links=0)
    good = {"tflags": ALL_FLAGS, "size": server.size, "align": 512}
    for wrong in ({"size": server.size - 512}, {"align": 4096}, {"tflags": ALL_FLAGS | w.TFLAG_READ_ONLY}):
        with server.connect() as sock, pytest.raises(PlaneError):
            rig.call(rig.plane.open_link, remote.object, sock.fileno(), LinkParams(**(good | wrong)))  # type: ignore[arg-type]


def test_stopping_with_a_write_in_doubt_ends(servers: list[FakeServer]) -> None:
    held, before = Held(w.CMD_WRITE), threading.active_count()
    with running(reactors=2) as rig:
        slow_write(rig, served(servers, handler=held), held)
    eventually("only the server's threads are left", lambda: threading.active_count() <= before + 3)
