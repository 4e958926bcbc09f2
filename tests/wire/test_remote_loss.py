"""Remote datastores whose server is killed, cut off, frozen or replaced: nothing is lost without a word."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib import nbdwords as w
from tests.lib.cutproxy import CutProxy
from tests.lib.peers import PEERS, Peer, closed_peers, nbdkit, qemu_nbd
from tests.lib.procs import wait_until
from tests.lib.rawio import NbdError
from tests.unit.plane_rig import Client
from tests.unit.remote_rig import at_rest
from tests.wire.remote import Far, using

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(180)
SIZE = 8 << 20
BLOCK = 4096


@pytest.fixture
def proxies() -> Iterator[list[CutProxy]]:
    made: list[CutProxy] = []
    yield made
    for one in made:
        one.close()


def behind(proxies: list[CutProxy], peer: Peer) -> tuple[CutProxy, str]:
    """A wire to the peer that can be cut, and the URI through it."""
    path = peer.folder / f"wire{len(proxies)}"
    proxies.append(CutProxy(path, peer.address))
    name = peer.uri.split("?")[0].rpartition("/")[2]
    return proxies[-1], f"nbd+unix:///{name}?socket={path}"


class Load:
    """Writes, in one thread, blocks that say who wrote them when; flushes now and then; remembers what was promised."""

    def __init__(self, client: Client, seed: int, *, durable: bool = False) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.durable = durable
        self.acknowledged: dict[int, int] = {}
        self.promised: dict[int, int] = {}
        self.sent: dict[int, int] = {}
        self.failed_flushes = 0
        self.written = 0
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.failure: BaseException | None = None

    def __enter__(self) -> Load:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure

    def wait_written(self, count: int) -> None:
        """Until so many more writes were acknowledged."""
        goal = self.written + count
        wait_until("writes go on", lambda: self.written >= goal or self.failure, 60)

    @staticmethod
    def bytes_of(block: int, number: int) -> bytes:
        return (block << 32 | number).to_bytes(8, "big") * (BLOCK // 8)

    def _run(self) -> None:
        try:
            for number in range(1, 1 << 31):
                if self._stop.is_set():
                    return
                self._step(number)
        except BaseException as failure:
            self.failure = failure

    def _step(self, number: int) -> None:
        block = self.random.randrange(SIZE // BLOCK)
        self.sent[block] = number
        self.client.write(block * BLOCK, self.bytes_of(block, number))
        self.acknowledged[block] = number
        self.written += 1
        if self.durable:
            self.promised[block] = number
        if number % 20 == 0:
            try:
                self.client.flush()
                self.promised |= self.acknowledged
            except NbdError:
                self.failed_flushes += 1

    def check(self, content: bytes) -> None:
        """Each block holds what was promised, or something written later."""
        for block, promised in self.promised.items():
            raw = content[block * BLOCK : (block + 1) * BLOCK]
            found = int.from_bytes(raw[:8], "big")
            assert raw == raw[:8] * (BLOCK // 8) and found >> 32 == block, f"block {block} is damaged"
            assert promised <= found & 0xFFFFFFFF <= self.sent[block], (block, promised, found & 0xFFFFFFFF)


@pytest.mark.parametrize("name", PEERS)
def test_kill_and_restart_of_the_server(peers: list[Peer], name: str) -> None:
    """Three times in the middle of a load. Flushes that fail are allowed, and said; a promise is a promise."""
    kills = 1 if name == "nbdvvol" else 3  # a whole farm takes its time
    peers.append(PEERS[name](SIZE).start())
    with using(peers[0].uri, hold_s=60.0) as far:
        with Load(far.client(timeout_s=60), 1) as load:
            for _ in range(kills):
                load.wait_written(60)
                peers[0].kill()
                time.sleep(0.3)
                peers[0].start()
                load.wait_written(30)
                wait_until("it serves again", lambda: far.stats.links > 0)
        assert load.failed_flushes == 0 or far.failed
        if far.failed:
            far.rig.call(far.rig.plane.clear_fault, far.export.number)
        load.client.flush()
        load.promised |= load.acknowledged if not far.failed else {}
        assert far.stats.lost >= kills
        assert [up for up, _ in far.told] == [False, True] * kills, far.told
        assert all("reconnecting since" in text for up, text in far.told if not up)
    load.check(peers[0].file.read_bytes())


@pytest.mark.parametrize("name", PEERS)
def test_write_through_survives_every_kill(peers: list[Peer], name: str) -> None:
    """With nothing owed there is nothing to fail: the load never notices."""
    kills = 1 if name == "nbdvvol" else 2
    peers.append(PEERS[name](SIZE).start())
    with using(peers[0].uri, hold_s=60.0, write_through=True) as far:
        with Load(far.client(timeout_s=60), 2, durable=True) as load:
            for _ in range(kills):
                load.wait_written(30)
                peers[0].kill()
                peers[0].start()
                load.wait_written(30)
        assert load.failed_flushes == 0 and not far.failed and far.stats.lost >= kills
    load.check(peers[0].file.read_bytes())


def test_cuts_of_the_wire(peers: list[Peer], proxies: list[CutProxy]) -> None:
    """All connections at once, eight times, under a load of reads and writes with several requests in flight."""
    peers.append(qemu_nbd(SIZE).start())  # nbdkit 1.32 does not survive this: its connections share a dead socket
    wire, uri = behind(proxies, peers[0])
    with using(uri, hold_s=60.0, write_through=True) as far:
        client = far.client(timeout_s=60)
        with Load(far.client(timeout_s=60), 3, durable=True) as load:
            cuts = 0
            while cuts < 8:
                cookies = [client.send(w.CMD_READ, at * 65536, 65536) for at in range(32)]
                cuts += wire.cut() > 0
                for cookie in cookies:
                    client.wait(cookie).check()
        quiet = at_rest(lambda: far.stats)
        assert quiet.again > 0 and quiet.asked == quiet.answered + quiet.again
        assert load.failed_flushes == 0 and not far.failed
    load.check(peers[0].file.read_bytes())


def test_a_cut_while_something_is_owed_fails_the_next_flush(peers: list[Peer], proxies: list[CutProxy]) -> None:
    """The server is the same, but who could know: it may have been another one."""
    peers.append(qemu_nbd(SIZE).start())
    wire, uri = behind(proxies, peers[0])
    with using(uri) as far:
        client = far.client()
        client.write(0, b"x" * BLOCK)
        wire.cut()
        wait_until("it is back", lambda: far.told[-1:] and far.told[-1][0])
        with pytest.raises(NbdError):
            client.flush()
        assert client.read(0, BLOCK) == b"x" * BLOCK
        far.rig.call(far.rig.plane.clear_fault, far.export.number)
        client.flush()


def test_a_frozen_server(peers: list[Peer]) -> None:
    """It takes connections (the kernel does) and says nothing: each try ends, and what waits goes on when it wakes."""
    peers.append(qemu_nbd(SIZE).start())  # nbdkit 1.32 may not survive clients that left while it was frozen
    with using(peers[0].uri, timeout_s=1.0, hold_s=60.0) as far:
        client = far.client(timeout_s=60)
        client.write(0, b"x" * BLOCK, flags=w.CMD_FLAG_FUA)
        peers[0].freeze(True)
        cookie = client.send(w.CMD_READ, 0, BLOCK)
        wait_until("the silence is noticed", lambda: far.told)
        assert "no answer to READ" in far.told[0][1]
        peers[0].freeze(False)
        assert client.wait(cookie).check().data == b"x" * BLOCK


def test_a_wire_that_stalls(peers: list[Peer], proxies: list[CutProxy]) -> None:
    """Bytes vanish on the way without a word; the other end never hears that we have gone."""
    peers.append(nbdkit(SIZE).start())
    wire, uri = behind(proxies, peers[0])
    with using(uri, timeout_s=1.0, hold_s=60.0, connections=1) as far:
        client = far.client(timeout_s=60)
        client.read(0, BLOCK)
        wire.stall(True)
        cookie = client.send(w.CMD_WRITE, 0, BLOCK, payload=b"y" * BLOCK)
        wait_until("the silence is noticed", lambda: far.told)
        wire.stall(False)
        client.wait(cookie).check()
        assert client.read(0, BLOCK) == b"y" * BLOCK


def test_patience_ends(peers: list[Peer]) -> None:
    """After `hold` I/O fails; a server that comes back later is used again."""
    peers.append(nbdkit(SIZE).start())
    with using(peers[0].uri, hold_s=1.0) as far:
        client = far.client()
        client.write(0, b"x" * BLOCK, flags=w.CMD_FLAG_FUA)
        peers[0].kill()
        with pytest.raises(NbdError) as failed:
            client.read(0, BLOCK)
        assert failed.value.error == 5
        peers[0].start()
        wait_until("it is back", lambda: far.stats.links > 0, 30)
        assert client.read(0, BLOCK) == b"x" * BLOCK


def test_knocking_is_polite(peers: list[Peer], proxies: list[CutProxy]) -> None:
    """While the server is away, few tries in a row, one at a time, however many connections there were."""
    peers.append(nbdkit(SIZE).start())
    wire, uri = behind(proxies, peers[0])
    with using(uri, connections=4) as far:
        wait_until("all serve", lambda: far.stats.links == 4)
        wire.refuse(True)
        before = wire.connections
        wire.cut()
        wait_until("some tries failed", lambda: wire.connections - before >= 4)
        assert wire.connections - before < 12
        wire.refuse(False)
        wait_until("all serve again", lambda: far.stats.links == 4, 30)


def test_an_export_that_shrank_is_not_the_one_we_knew(peers: list[Peer]) -> None:
    peers.append(nbdkit(SIZE).start())
    with using(peers[0].uri, hold_s=2.0) as far:
        client = far.client()
        client.write(0, b"x" * BLOCK, flags=w.CMD_FLAG_FUA)
        peers[0].kill()
        os.truncate(peers[0].file, SIZE // 2)
        peers[0].start()
        with pytest.raises(NbdError):
            client.read(0, BLOCK)
        assert far.stats.links == 0 and "shrank from 8388608 to 4194304" in far.export._machine.last_error
        os.truncate(peers[0].file, SIZE)
        peers[0].kill()
        peers[0].start()
        wait_until("it is the one we knew", lambda: far.stats.links > 0, 30)
        assert client.read(0, BLOCK) == b"x" * BLOCK


def test_an_export_that_grew_is_fine(peers: list[Peer]) -> None:
    peers.append(qemu_nbd(SIZE).start())
    with using(peers[0].uri) as far:
        client = far.client()
        peers[0].kill()
        os.truncate(peers[0].file, 2 * SIZE)
        peers[0].start()
        assert client.read(0, BLOCK) == bytes(BLOCK)
        assert far.rig.wait(far.export.refresh()) == 2 * SIZE


def test_a_server_of_one_connection_at_a_time(peers: list[Peer]) -> None:
    """No CAN_MULTI_CONN: one is dialled, whatever was wished for."""
    peers.append(nbdkit(SIZE, "--filter=multi-conn", "multi-conn-mode=disable").start())
    with using(peers[0].uri, connections=8) as far:
        client = far.client()
        for at in range(50):
            client.write(at * BLOCK, b"z" * BLOCK)
        client.flush()
        assert far.stats.links == 1 and far.stats.lost == 0


def test_a_farm_that_stops_and_comes_back(peers: list[Peer], tmp_path: Path) -> None:
    """Our own filter ends its connections in order: requests move to the next connection, none fails."""
    from tests.lib.peers import FarmPeer

    peer = FarmPeer(SIZE)
    peers.append(peer)
    peer.start()
    with using(peer.uri, hold_s=60.0, write_through=True) as far:
        with Load(far.client(timeout_s=60), 4, durable=True) as load:
            load.wait_written(30)
            peer.farm.stop()
            peer.farm.start()
            load.wait_written(30)
        assert load.failed_flushes == 0
    load.check(peer.file.read_bytes())


def test_a_filter_may_end_while_an_export_is_being_closed(peers: list[Peer]) -> None:
    """Both let go of it: the second one finds nothing to do (`using` quits at its end)."""
    peers.append(nbdkit(1 << 20).start())
    with using(peers[0].uri) as far:
        far.rig.wait(far.export.close())


def test_every_far_end_is_let_go(peers: list[Peer]) -> None:
    """Closing leaves no connection behind, also while the server is away."""
    peers.append(nbdkit(SIZE).start())
    with using(peers[0].uri) as far:
        far.client().read(0, BLOCK)
        number = far.export.number
        other = Far(far.rig, peers[0].uri)
        far.rig.wait(other.export.close())
        peers[0].kill()
        wait_until("it is missed", lambda: far.told)
        assert far.stats.links == 0 and number == far.export.number
