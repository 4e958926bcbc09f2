"""Remote datastores on other people's servers and on ours: every byte right, and what they can is used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdvvol.model.errors import Code, NvError
from tests.lib import nbdwords as w
from tests.lib.peers import PEERS, Peer, closed_peers, nbd_server, nbdkit, qemu_nbd
from tests.lib.procs import wait_until
from tests.unit.test_plane_data import Model
from tests.wire.remote import using

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(120)
SIZE = 8 << 20


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    one = PEERS[request.param](SIZE)
    try:
        yield one.start()
    finally:
        one.close()


def test_random_operations(peer: Peer) -> None:
    """... and what the server's file holds afterwards is what was written."""
    with using(peer.uri) as far:
        client = far.client()
        model = Model(client, SIZE, 1, seed=5)
        model.run(120)
        client.flush()
        assert far.stats.errors == far.stats.lost == 0 and not far.failed
        assert not far.stats.owed
    assert peer.file.read_bytes() == model.bytes


def test_connections_and_words(peer: Peer) -> None:
    """Several connections where the server says that they are one; extents and FUA where it has them."""
    with using(peer.uri, connections=3) as far:
        client = far.client()
        flags = far.export._info.flags
        wanted = 3 if flags & w.TFLAG_CAN_MULTI_CONN else 1
        wait_until("all connections serve", lambda: far.stats.links == wanted)
        client.write(1 << 20, b"x" * 65536, flags=w.CMD_FLAG_FUA)
        assert peer.file.read_bytes()[1 << 20 : (1 << 20) + 65536] == b"x" * 65536
        extents = client.status(0, SIZE)
        assert sum(length for length, _ in extents) == SIZE
        assert all(state == 0 for _, state in extents) or extents[0] == (1 << 20, 3)
        client.zero(1 << 20, 65536)
        client.flush()
        assert client.read(1 << 20, 65536) == bytes(65536)


def test_the_largest_requests(peer: Peer) -> None:
    """32 MiB at once, through whatever the server takes as a maximum."""
    with using(peer.uri) as far:
        client = far.client()
        data = bytes(range(256)) * (SIZE // 256)
        client.write(0, data)
        assert client.read(0, SIZE) == data


@pytest.mark.parametrize("block", [512, 4096])
def test_a_server_with_large_blocks(peers: list[Peer], block: int) -> None:
    peers.append(
        nbdkit(SIZE, "--filter=blocksize-policy", f"blocksize-minimum={block}", "blocksize-error-policy=error").start()
    )
    with using(peers[0].uri) as far:
        assert far.export.spec.align == block
        Model(far.client(), SIZE, block, seed=6).run(60)
        assert far.stats.errors == 0


def test_an_export_that_may_only_be_read(peers: list[Peer]) -> None:
    peers.append(qemu_nbd(SIZE, "--read-only").start())
    with pytest.raises(NvError) as refused, using(peers[0].uri):
        pass
    assert refused.value.code is Code.DENIED and "is read-only" in refused.value.message
    with using(peers[0].uri, may_read_only=True) as far:
        assert far.client(read_only=True).read(0, 4096) == bytes(4096)


def test_a_server_without_flush_is_written_through(peers: list[Peer]) -> None:
    """nbd-server without `flush` but with `fua`: every write is durable when it is answered, or not answered."""
    peers.append(nbd_server(SIZE, "flush = false", "fua = true").start())
    with using(peers[0].uri) as far:
        client = far.client()
        client.write(0, b"x" * 4096)
        client.flush()
        assert not far.stats.owed


def test_a_server_without_flush_and_fua_is_not_written_to(peers: list[Peer]) -> None:
    peers.append(nbd_server(SIZE, "flush = false", "fua = false").start())
    with pytest.raises(NvError, match="neither FLUSH nor FUA"), using(peers[0].uri):
        pass


def test_no_such_export_and_no_such_server(peers: list[Peer]) -> None:
    peers.append(qemu_nbd(SIZE).start())
    wrong = peers[0].uri.replace("/e?", "/other?")
    with pytest.raises(NvError) as refused, using(wrong):
        pass
    assert refused.value.code is Code.NOT_FOUND
    with pytest.raises(NvError) as refused, using("nbd://127.0.0.1:1/x"):
        pass
    assert refused.value.code is Code.UNAVAILABLE and "Connection refused" in refused.value.message
