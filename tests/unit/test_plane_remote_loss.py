"""Remote exports whose connections are lost: what is sent again, what is owed, what must never be said."""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lib import nbdwords as w
from tests.lib.fakeserver import Asked, FakeServer, Wire
from tests.lib.rawio import NbdError
from tests.unit.plane_rig import Client, Rig, eventually, rig, running
from tests.unit.remote_rig import Remote
from tests.unit.test_plane_remote import served, servers

__all__ = ["rig", "servers"]
SIZE = 1 << 20


class Held:
    """A handler that keeps chosen requests unanswered until it is told otherwise."""

    def __init__(self, *commands: int) -> None:
        self.commands = set(commands)
        self.kept: list[tuple[Wire, Asked]] = []
        self.release = threading.Event()

    def __call__(self, server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command not in self.commands or self.release.is_set():
            return None
        self.kept.append((wire, asked))
        return []


def fails(error: int, act: Callable[[], object]) -> None:
    with pytest.raises(NbdError) as failed:
        act()
    assert failed.value.error == error


@pytest.mark.parametrize("command", [w.CMD_READ, w.CMD_WRITE])
def test_what_was_not_answered_is_sent_again(rig: Rig, servers: list[FakeServer], command: int) -> None:
    """... on another link at once, with the other link's server state unharmed."""
    held = Held(command)
    held.release.set()
    server = served(servers, handler=held)
    remote = Remote(rig, server, links=2)
    client = rig.connect(remote.volume())
    eventually("both serve", lambda: remote.stats.links == 2)
    held.release.clear()
    payload = b"w" * 4096 if command == w.CMD_WRITE else None
    cookies = [client.send(command, at * 4096, 4096, payload=payload) for at in range(30)]
    eventually("both links hold some", lambda: len({id(wire) for wire, _ in held.kept}) == 2 and len(held.kept) == 30)
    moving = sum(wire is server.wires[0] for wire, _ in held.kept)
    server.cut(0)
    assert remote.ends[0].result(10).errno == errno.ECONNRESET
    eventually("the other link has them all", lambda: len(held.kept) == 30 + moving)
    server.cut(1)
    remote.ends[1].result(10)
    held.release.set()
    remote.link()
    for cookie in cookies:
        client.wait(cookie).check()
    assert remote.stats.again >= 30 and remote.stats.links == 1
    if command == w.CMD_WRITE:
        assert server.bytes[: 30 * 4096] == b"w" * (30 * 4096)
    assert not remote.failed, "nothing was owed: no write had been acknowledged"


def test_io_waits_for_a_link(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers)
    remote = Remote(rig, server, links=0)
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_READ, 0, 4096)
    eventually("it waits", lambda: remote.stats.waiting == 1)
    remote.link()
    assert client.wait(cookie).check().data == bytes(4096)


def test_giving_up_fails_what_waits_and_a_link_ends_it(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers)
    remote = Remote(rig, server, links=0)
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_READ, 0, 4096)
    eventually("it waits", lambda: remote.stats.waiting == 1)
    rig.call(rig.plane.give_up_remote, remote.object, yes=True)
    assert client.wait(cookie).error == 5
    fails(5, lambda: client.write(0, b"x" * 512))
    remote.link()
    eventually("it serves", lambda: remote.stats.links == 1)
    client.write(0, b"x" * 512)
    rig.call(rig.plane.give_up_remote, remote.object, yes=True)  # means nothing while a link serves
    assert client.read(0, 512) == b"x" * 512


def test_a_server_that_comes_back_without_what_it_owed_is_found_out(rig: Rig, servers: list[FakeServer]) -> None:
    """The heart of it: acknowledged, not flushed, server restarted: FLUSH must not succeed."""
    server = served(servers)
    remote = Remote(rig, server, links=2)
    client = rig.connect(remote.volume())
    client.write(0, b"flushed!" * 64)
    client.flush()
    client.write(4096, b"owed" * 128)
    server.reboot()
    for end in remote.ends:
        end.result(10)
    eventually("the fault is told", lambda: remote.failed == [(remote.object, errno.ESTALE)])
    remote.link()
    fails(5, client.flush)
    assert client.read(0, 512) == b"flushed!" * 64
    assert client.read(4096, 512) == bytes(512), "reads and writes go on"
    client.write(8192, b"after" * 100)
    fails(5, client.flush)
    fails(5, lambda: client.write(8192, b"x" * 512, flags=w.CMD_FLAG_FUA))
    rig.call(rig.plane.clear_fault, remote.object)
    client.flush()
    assert server.durable[8192 : 8192 + 500] == b"after" * 100


def test_a_server_that_owed_nothing_comes_back_unnoticed(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    client.write(0, b"flushed!" * 64)
    client.flush()
    client.write(4096, b"durable!" * 64, flags=w.CMD_FLAG_FUA)
    server.reboot()
    remote.ends[0].result(10)
    remote.link()
    client.flush()
    assert client.read(0, 512) == b"flushed!" * 64 and client.read(4096, 512) == b"durable!" * 64
    assert not remote.failed


def test_while_one_link_lives_nothing_is_lost(rig: Rig, servers: list[FakeServer]) -> None:
    """One of two connections breaks: the server is the same, and the other connection's FLUSH covers all."""
    server = served(servers)
    remote = Remote(rig, server, links=2)
    client = rig.connect(remote.volume())
    for at in range(40):
        client.write(at * 512, b"x" * 512)
    server.cut(0)
    remote.ends[0].result(10)
    remote.link()
    client.flush()
    assert server.durable[: 40 * 512] == b"x" * (40 * 512) and not remote.failed
    eventually("both serve", lambda: remote.stats.links == 2)


def test_a_new_link_serves_only_once_the_old_ones_have_shown_life(rig: Rig, servers: list[FakeServer]) -> None:
    """The old server hangs: a connection to what may be its successor must not vouch for it."""
    held = Held(w.CMD_READ, w.CMD_WRITE, w.CMD_FLUSH)
    held.release.set()
    old = served(servers, handler=held)
    remote = Remote(rig, old)
    client = rig.connect(remote.volume())
    client.write(0, b"owed" * 128)
    held.release.clear()  # from here on the old server is silent
    successor = served(servers)
    remote.server = successor
    remote.link()
    eventually("the old link is asked for a sign of life", lambda: len(held.kept) == 1)
    flush = client.send(w.CMD_FLUSH)
    read = client.send(w.CMD_READ, 0, 512)
    eventually("the old link has all", lambda: len(held.kept) == 3)
    assert remote.stats.links == 1 and not successor.asked
    old.cut(0)
    assert client.wait(flush).error == 5, "what the old server owed is lost, and said so"
    assert client.wait(read).check().data == bytes(512)
    eventually("the fault is told", lambda: remote.failed == [(remote.object, errno.ESTALE)])


def test_a_sign_of_life_lets_the_new_link_in(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_READ)
    server = served(servers, handler=held)
    remote = Remote(rig, server)
    rig.connect(remote.volume()).write(0, b"owed" * 128)
    remote.link()
    eventually("asked", lambda: len(held.kept) == 1)
    assert remote.stats.links == 1
    wire, asked = held.kept[0]
    wire.send(wire.data(asked, asked.offset, b"\0" * asked.length, done=True))
    eventually("both serve", lambda: remote.stats.links == 2)


def test_a_flush_under_way_when_its_server_goes_fails(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_FLUSH)
    server = served(servers, handler=held)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    client.write(0, b"owed" * 128)
    cookie = client.send(w.CMD_FLUSH)
    eventually("the server has it", lambda: len(held.kept) == 1)
    held.release.set()
    server.reboot()
    remote.ends[0].result(10)
    remote.link()
    assert client.wait(cookie).error == 5


def test_a_flush_under_way_moves_to_another_link_of_the_same_server(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_FLUSH)
    server = served(servers, handler=held)
    remote = Remote(rig, server, links=2)
    client = rig.connect(remote.volume())
    client.write(0, b"owed" * 128)
    cookie = client.send(w.CMD_FLUSH)
    eventually("the server has it", lambda: len(held.kept) == 1)
    held.release.set()
    server.cut(server.wires.index(held.kept[0][0]))
    client.wait(cookie).check()
    assert server.durable[:512] == b"owed" * 128 and not remote.failed


@pytest.mark.parametrize("command", [w.CMD_READ, w.CMD_WRITE, w.CMD_FLUSH])
def test_a_silent_server_loses_its_link(rig: Rig, servers: list[FakeServer], command: int) -> None:
    held = Held(command)
    server = served(servers, handler=held)
    remote = Remote(rig, server, timeout_ms=500)
    client = rig.connect(remote.volume())
    if command != w.CMD_WRITE:
        client.write(0, b"x" * 512, flags=0 if command == w.CMD_FLUSH else w.CMD_FLAG_FUA)
    payload = b"y" * 512 if command == w.CMD_WRITE else None
    cookie = client.send(command, 0, 0 if command == w.CMD_FLUSH else 512, payload=payload)
    end = remote.ends[0].result(10)
    patience = "2000 ms" if command == w.CMD_FLUSH else "500 ms"
    assert end.errno == errno.ETIMEDOUT and "no answer to" in end.reason and patience in end.reason
    held.release.set()
    remote.link()
    if command == w.CMD_WRITE:
        eventually("it is not sent again while the old one may be under way", lambda: remote.stats.draining == 1)
        assert len(server.of(w.CMD_WRITE)) == 1
        held.kept[0][0].close()
    answer = client.wait(cookie)
    assert answer.error == (5 if command == w.CMD_FLUSH else 0)


def test_waiting_costs_nothing(rig: Rig, servers: list[FakeServer]) -> None:
    """No link, requests that wait, a fault: the reactors sleep."""
    server = served(servers)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    client.write(0, b"x" * 512)
    server.cut(0)
    remote.ends[0].result(10)
    client.send(w.CMD_READ, 0, 512)
    eventually("it waits, and the fault is told", lambda: remote.stats.waiting == 1 and remote.failed)
    before = sum(one.enters for one in rig.call(rig.plane.reactor_stats))
    time.sleep(1)
    assert sum(one.enters for one in rig.call(rig.plane.reactor_stats)) - before < 50


def test_an_idle_link_is_left_alone(rig: Rig, servers: list[FakeServer]) -> None:
    """Longer than the time-out without a request: nothing happens, nothing is sent."""
    server = served(servers)
    remote = Remote(rig, server, timeout_ms=250)
    client = rig.connect(remote.volume())
    client.read(0, 512)
    time.sleep(1.2)
    assert remote.stats.links == 1 and len(server.asked) == 1
    assert client.read(0, 512) == bytes(512)


def test_a_server_that_takes_nothing_in(rig: Rig, servers: list[FakeServer]) -> None:
    """Its receive buffer is full: the write's bytes do not even leave."""
    blocked = threading.Event()

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == w.CMD_WRITE and len(server.wires) == 1:
            blocked.wait(20)
        return None

    server = served(servers, size=32 << 20, handler=handler)
    remote = Remote(rig, server, timeout_ms=500)
    client = rig.connect(remote.volume(), 32 << 20)
    cookies = [client.send(w.CMD_WRITE, at << 20, 1 << 20, payload=b"z" * (1 << 20)) for at in range(3)]
    assert remote.ends[0].result(10).errno == errno.ETIMEDOUT
    remote.link()
    blocked.set()
    for cookie in cookies:
        client.wait(cookie).check()
    assert client.read(0, 3 << 20) == b"z" * (3 << 20)


def test_a_server_that_shuts_down_is_left_for_another_link(rig: Rig, servers: list[FakeServer]) -> None:
    """ESHUTDOWN says that nothing was done: the client above never hears of it."""
    down = threading.Event()

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wire.error(asked, 108, "going down")] if down.is_set() and wire is server.wires[0] else None

    server = served(servers, handler=handler)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    client.write(0, b"x" * 512, flags=w.CMD_FLAG_FUA)
    down.set()
    cookie = client.send(w.CMD_READ, 0, 512)
    end = remote.ends[0].result(10)
    assert end.errno == errno.ESHUTDOWN and "shuts down" in end.reason
    remote.link()
    assert client.wait(cookie).check().data == b"x" * 512
    assert not remote.failed


@pytest.mark.parametrize("command", [w.CMD_READ, w.CMD_WRITE, w.CMD_FLUSH])
def test_a_server_that_shuts_down_for_ever_is_an_error(rig: Rig, servers: list[FakeServer], command: int) -> None:
    """Each new link is told the same. That ends when I/O would no longer wait for a server that is away."""
    down = threading.Event()

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wire.error(asked, 108)] if down.is_set() and asked.command == command else None

    server = served(servers, handler=handler)
    remote = Remote(rig, server, hold_ms=500)
    client = rig.connect(remote.volume())
    client.write(0, b"x" * 512, flags=w.CMD_FLAG_FUA)  # nothing is owed
    down.set()
    length = 512 if command != w.CMD_FLUSH else 0
    cookie = client.send(command, 0, length, payload=b"y" * length if command == w.CMD_WRITE else None)
    while not readable(client):
        if remote.ends[-1].done():
            remote.link()
    assert client.wait(cookie).error == errno.EIO
    assert len(remote.ends) > 2, "one link, or two, may be told so by chance"
    down.clear()
    remote.link()
    if command != w.CMD_FLUSH:  # nothing is latched by what was not done
        client.write(0, b"z" * 512)
        client.flush()
        assert client.read(0, 512) == b"z" * 512


def readable(client: Client) -> bool:
    """Whether an answer is there."""
    return bool(select.select([client.stream.sock], [], [], 0.02)[0])


def test_a_plane_closes_though_its_server_is_gone(servers: list[FakeServer]) -> None:
    """Requests wait for a link that never comes: the end does not."""
    with running(reactors=2) as rig:
        server = served(servers)
        remote = Remote(rig, server, links=1)
        client = rig.connect(remote.volume())
        client.write(0, b"x" * 512)
        server.cut(0)
        remote.ends[0].result(10)
        client.send(w.CMD_READ, 0, 512)
        eventually("it waits", lambda: remote.stats.waiting == 1)


def test_a_plane_closes_though_its_server_hangs(servers: list[FakeServer]) -> None:
    held = Held(w.CMD_READ)
    with running(reactors=2) as rig:
        server = served(servers, handler=held)
        remote = Remote(rig, server, links=2, timeout_ms=500)
        client = rig.connect(remote.volume())
        client.send(w.CMD_READ, 0, 512)
        eventually("the server has it", lambda: len(held.kept) >= 1)


def test_objects_close_with_links_in_every_state(rig: Rig, servers: list[FakeServer]) -> None:
    held = Held(w.CMD_READ)
    server = served(servers, handler=held)
    remote = Remote(rig, server, links=4)  # one serves, three wait for the first to show life
    eventually("asked", lambda: len(held.kept) == 1)
    rig.wait(rig.plane.close_object(remote.object))
    for end in remote.ends:
        assert end.result(10).errno in (0, errno.ESHUTDOWN)
    empty = Remote(rig, server, links=0)
    rig.wait(rig.plane.close_object(empty.object))


def test_two_reactors_share_a_remote(servers: list[FakeServer]) -> None:
    """Clients on another reactor than the remote's home: pieces and syncs travel."""
    with running(reactors=3) as rig:
        server = served(servers)
        remote = Remote(rig, server, links=2)
        volume = remote.volume()
        clients = [rig.connect(volume) for _ in range(6)]
        for index, client in enumerate(clients):
            client.write(index * 4096, bytes([65 + index]) * 4096)
        for index, client in enumerate(reversed(clients)):
            client.flush()
            assert client.read(index * 4096, 4096) == bytes([65 + index]) * 4096
        assert server.durable[: 6 * 4096] == b"".join(bytes([65 + i]) * 4096 for i in range(6))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    eventually("threads end", lambda: threading.active_count() <= before + 1)
