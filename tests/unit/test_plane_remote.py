"""Remote exports as objects: every byte right in all header styles, splits and chunks, and with few talents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lib import nbdwords as w
from tests.lib.fakeserver import ALL_FLAGS, Asked, FakeServer, Wire
from tests.lib.rawio import STYLES, NbdError, Style
from tests.unit.plane_rig import Rig, eventually, rig
from tests.unit.remote_rig import Remote, at_rest
from tests.unit.test_plane_data import Model

__all__ = ["rig"]
SIZE = 8 << 20


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    """Servers that are closed, and found without a failure, after the test."""
    made: list[FakeServer] = []
    yield made
    for server in made:
        server.close()


def served(servers: list[FakeServer], **how: object) -> FakeServer:
    servers.append(FakeServer(**how))  # type: ignore[arg-type]
    return servers[-1]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("links", [1, 3])
def test_random_operations(rig: Rig, servers: list[FakeServer], style: Style, links: int) -> None:
    server = served(servers, size=SIZE, style=style)
    remote = Remote(rig, server, links=links)
    Model(rig.connect(remote.volume(), SIZE, "structured"), SIZE, 1, seed=links).run(150)
    quiet = at_rest(lambda: remote.stats)
    assert quiet.asked == quiet.answered == len(server.asked)


@pytest.mark.parametrize("style", ["structured", "extended"])
def test_chunks_in_any_order_and_mixed(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    server = served(servers, size=SIZE, style=style, jumble=7)
    client = rig.connect(Remote(rig, server).volume(), SIZE, "structured")
    Model(client, SIZE, 1, seed=3).run(100)
    cookies = [client.send(w.CMD_READ, at * 4096, 40960) for at in range(100)]
    for at, cookie in enumerate(cookies):
        assert client.wait(cookie).check().data == server.bytes[at * 4096 : at * 4096 + 40960]


@pytest.mark.parametrize("block", [1, 512, 65536])
def test_large_requests_are_split_as_the_server_wants(rig: Rig, servers: list[FakeServer], block: int) -> None:
    server = served(servers, size=SIZE, block=block, payload_max=max(65536, block))
    client = rig.connect(Remote(rig, server).volume(), SIZE, block_min=block)
    data = bytes(range(256)) * (SIZE // 256)
    client.write(0, data)
    assert client.read(0, SIZE) == data == server.bytes
    assert max(one.length for one in server.asked) == server.payload_max


def test_requests_of_one_turn_share_links_and_leave_together(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers, size=SIZE)
    remote = Remote(rig, server, links=4)
    client = rig.connect(remote.volume(), SIZE)
    for _ in range(20):
        for cookie in [client.send(w.CMD_READ, at << 20, 4096) for at in range(8)]:
            client.wait(cookie).check()
    assert remote.stats.answered >= 160


def test_extents_come_from_the_server(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers, size=SIZE)
    server.bytes[1 << 20 : 2 << 20] = b"x" * (1 << 20)
    client = rig.connect(Remote(rig, server).volume(), SIZE, "structured")
    extents = client.status(0, SIZE)
    assert extents == [(1 << 20, 3), (1 << 20, 0), (6 << 20, 3)]


def test_without_block_status_everything_is_data(rig: Rig, servers: list[FakeServer]) -> None:
    client = rig.connect(Remote(rig, served(servers, style="simple")).volume(), style="structured")
    extents = client.status(0, 1 << 20)
    assert extents == [(1 << 20, 0)]


def test_a_status_that_overshoots_is_cut(rig: Rig, servers: list[FakeServer]) -> None:
    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command != w.CMD_BLOCK_STATUS:
            return None
        return [wire.status(asked, [(4096, 0), (4096, 0), (1 << 30, 3)])]

    client = rig.connect(Remote(rig, served(servers, handler=handler)).volume(), style="structured")
    extents = client.status(0, 65536)
    assert extents[0] == (8192, 0) and extents[1][1] == 3


FEW = w.TFLAG_HAS_FLAGS | w.TFLAG_SEND_FLUSH


def test_a_server_of_few_talents(rig: Rig, servers: list[FakeServer]) -> None:
    """No FUA, TRIM, WRITE_ZEROES or CACHE: done by other means, or not at all where it is a hint."""
    server = served(servers, size=SIZE, tflags=FEW)
    client = rig.connect(Remote(rig, server).volume(), SIZE)
    client.write(0, b"x" * (3 << 20))
    client.zero(1 << 20, 2 << 20)
    client.trim(0, 4096)
    client.send(w.CMD_CACHE, 0, 4096)
    assert client.read(0, 3 << 20) == b"x" * (1 << 20) + bytes(2 << 20)
    with pytest.raises(NbdError) as refused:
        client.zero(0, 4096, flags=w.CMD_FLAG_FAST_ZERO)
    assert refused.value.error == 95
    assert {one.command for one in server.asked} == {w.CMD_READ, w.CMD_WRITE}
    assert not server.of(w.CMD_FLUSH)
    client.write(0, b"durable!", flags=w.CMD_FLAG_FUA)
    assert server.durable[:8] == b"durable!" and len(server.of(w.CMD_FLUSH)) == 1


def test_fua_and_flush_reach_the_server(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    client.write(0, b"a" * 512, flags=w.CMD_FLAG_FUA)
    assert server.durable[:512] == b"a" * 512 and not server.of(w.CMD_FLUSH) and not remote.stats.owed
    client.write(512, b"b" * 512)
    assert server.durable[512:1024] == bytes(512) and remote.stats.owed
    client.flush()
    assert server.durable[512:1024] == b"b" * 512 and not remote.stats.owed
    client.zero(0, 512, flags=w.CMD_FLAG_FUA)
    assert server.durable[:512] == bytes(512)


def test_write_through_owes_nothing(rig: Rig, servers: list[FakeServer]) -> None:
    """... with FUA where there is one, else by a FLUSH behind each change."""
    for tflags in (ALL_FLAGS, ALL_FLAGS & ~w.TFLAG_SEND_FUA, ALL_FLAGS & ~w.TFLAG_SEND_FLUSH):
        server = served(servers, tflags=tflags)
        remote = Remote(rig, server, write_through=True)
        client = rig.connect(remote.volume())
        client.write(0, b"x" * 4096)
        client.zero(1024, 1024)
        client.trim(3072, 1024)
        assert server.durable[:4096] == server.bytes[:4096] == b"x" * 1024 + bytes(1024) + b"x" * 1024 + bytes(1024)
        assert not remote.stats.owed
        client.flush()


def test_a_write_that_is_refused_is_the_clients_error(rig: Rig, servers: list[FakeServer]) -> None:
    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        errors = {w.CMD_WRITE: 28, w.CMD_READ: 5, w.CMD_TRIM: 22}
        return [wire.error(asked, errors[asked.command], "because")] if asked.command in errors else None

    remote = Remote(rig, served(servers, handler=handler))
    client = rig.connect(remote.volume())
    for act, error in ((lambda: client.write(0, b"x" * 512), 28), (lambda: client.read(0, 512), 5)):
        with pytest.raises(NbdError) as failed:
            act()
        assert failed.value.error == error
    client.trim(0, 512)  # a hint
    assert remote.stats.errors == 3 and remote.stats.lost == 0


def test_more_requests_than_a_link_takes(rig: Rig, servers: list[FakeServer]) -> None:
    server = served(servers, size=SIZE)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume(), SIZE)
    cookies = [client.send(w.CMD_READ, at * 4096, 4096) for at in range(200)]
    for cookie in cookies:
        assert client.wait(cookie).check().data == bytes(4096)
    assert at_rest(lambda: remote.stats).again == 0


def test_jobs_run_on_remote_objects(rig: Rig, servers: list[FakeServer]) -> None:
    """Metadata, scrubbing and syncs of the control path."""
    server = served(servers, size=SIZE, block=4096)
    server.bytes[1 << 20 : 2 << 20] = b"old" + b"x" * ((1 << 20) - 3)
    obj = Remote(rig, server).object
    rig.wait(rig.plane.write(obj, 4096, b"m" * 4096))
    assert server.durable[4096:8192] == b"m" * 4096
    assert rig.wait(rig.plane.read(obj, 4096, 4096)) == b"m" * 4096
    rig.wait(rig.plane.zero(obj, 1 << 20, 1 << 20))
    assert server.durable[1 << 20 : 2 << 20] == bytes(1 << 20)
    rig.wait(rig.plane.close_object(obj))
    eventually("the server hears DISC", lambda: len(server.of(w.CMD_DISC)) == 1)


def test_what_a_server_did_counts_as_any_storages_work_does(rig: Rig, servers: list[FakeServer]) -> None:
    """On the reactor of each client, at home or not; the remote's own flushes and probes are nobody's work."""
    remote = Remote(rig, served(servers, size=SIZE), links=2)
    volume = remote.volume()
    for client in (rig.connect(volume, SIZE), rig.connect(volume, SIZE)):
        for _ in range(5):
            client.write(0, bytes(4096))
            assert client.read(0, 8192) == bytes(8192)
        client.zero(0, 4096)
        client.trim(0, 4096)
        client.flush()
    found = rig.call(rig.plane.object_stats, remote.object)
    assert (found.reads, found.writes, found.zeroes, found.trims, found.syncs) == (10, 10, 2, 2, 2)
    assert (found.read_bytes, found.write_bytes, found.others, found.errors) == (10 * 8192, 10 * 4096, 0, 0)
