"""The socket driver: hand-over without over-reading, limits in time and number, TLS hand-over."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass

import pytest
import uvloop

from nbdvvol.dataplane.types import ConnectionEnd, TlsAction, TlsOption, VolumeDescription
from nbdvvol.nbd.constants import Reply
from nbdvvol.nbd.haggle import TlsRule
from nbdvvol.nbd.provider import Facts, Listing, Opened, Provider, ReplyError
from nbdvvol.nbd.server import Limits, Server, Visit
from tests.unit.fake_plane import FakeContext, FakePlane

HELLO = b"NBDMAGICIHAVEOPT\0\3"
ACK = 1
QUICK = Limits(silence_s=0.3, total_s=1.0, haggling_max=2, connections_max=3)


class Disk(Provider):
    """One export; who asks is in its description."""

    def __init__(self, plane: FakePlane, who: str = "") -> None:
        self.plane = plane
        self.who = who
        if 7 not in plane.volumes:
            plane.volumes[7] = VolumeDescription(bytes(16), 1 << 20, 1, 1, 0, 1, ())

    async def list(self) -> Sequence[Listing]:
        return [Listing("disk", self.who)]

    async def info(self, name: str) -> Facts:
        raise ReplyError(Reply.ERR_UNKNOWN, "none")

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        return []

    async def open(self, name: str) -> Opened:
        return Opened(Facts("disk", 1 << 20, 1, self.who), 7)


def option(number: int, payload: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(payload)) + payload


GO = option(7, struct.pack(">I", 0) + bytes(2))


@dataclass
class Client:
    sock: socket.socket
    server: Server
    plane: FakePlane

    async def read(self, count: int) -> bytes:
        data = b""
        async with asyncio.timeout(5):
            while len(data) < count:
                piece = await asyncio.get_running_loop().sock_recv(self.sock, count - len(data))
                if not piece:
                    break
                data += piece
        return data

    async def ended(self) -> bool:
        """Whether the server closed the connection without another byte."""
        return await self.read(1) == b""

    async def reply(self) -> tuple[int, bytes]:
        _, _, kind, length = struct.unpack(">QIII", await self.read(20))
        return kind, await self.read(length)


@pytest.fixture
async def plane() -> AsyncIterator[FakePlane]:
    plane = FakePlane()
    yield plane
    for connection in plane.connections:
        connection.sock.close()
    for sock, _ in plane.tls:
        sock.close()


def connect(
    plane: FakePlane, rule: TlsRule = TlsRule.OFF, server: Server | None = None, limits: Limits = QUICK
) -> Client:
    visit = Visit(Disk(plane, "plain"), rule, FakeContext(), lambda identity: Disk(plane, identity))
    server = server or Server(lambda sock: visit, plane, limits)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    server.welcome(theirs)
    return Client(ours, server, plane)


async def test_go_hands_the_socket_over_and_leaves_early_requests_in_it(plane: FakePlane) -> None:
    client = connect(plane)
    client.sock.send(b"\0\0\0\1" + GO + b"first request")
    assert await client.read(18) == HELLO
    assert (await client.reply())[0] == 3
    assert await client.reply() == (ACK, b"")
    await asyncio.sleep(0.05)
    [connection] = plane.connections
    assert connection.volume == 7 and connection.sock.recv(100) == b"first request"
    assert client.server.connections == 1
    plane.hang_up(connection)
    await asyncio.wait_for(client.server.idle(), 1)
    assert await client.ended()


async def test_export_name_hands_over(plane: FakePlane) -> None:
    client = connect(plane)
    client.sock.send(b"\0\0\0\3" + option(1, b"disk") + b"x")
    assert await client.read(28) == HELLO + struct.pack(">QH", 1 << 20, 1)
    await asyncio.sleep(0.05)
    assert plane.connections[0].sock.recv(9) == b"x"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0", b"\0\0\0\1", b"\0\0\0\1" + GO[:10], b"\0\0\0\1" + GO[:-1]],
    ids=["nothing", "half flags", "flags", "half header", "half payload"],
)
async def test_h2_silence_ends_the_handshake(plane: FakePlane, data: bytes) -> None:
    client = connect(plane)
    client.sock.send(data)
    assert await client.read(18) == HELLO
    begin = asyncio.get_running_loop().time()
    assert await client.ended()
    assert 0.2 < asyncio.get_running_loop().time() - begin < 0.9
    assert client.server.connections == 0


async def test_h2_a_dripping_client_runs_into_the_total_limit(plane: FakePlane) -> None:
    client = connect(plane)
    begin = asyncio.get_running_loop().time()
    drip = asyncio.create_task(_drip(client))
    assert await client.read(18) == HELLO
    assert await client.ended()
    assert 0.8 < asyncio.get_running_loop().time() - begin < 1.8
    drip.cancel()


async def _drip(client: Client) -> None:
    for byte in b"\0\0\0\1" + option(3, b"y" * 100):
        client.sock.send(bytes([byte]))
        await asyncio.sleep(0.1)


async def test_a_client_that_does_not_take_answers_is_dropped(plane: FakePlane) -> None:
    class Endless(Disk):
        async def list(self) -> Sequence[Listing]:
            return [Listing("disk", "d" * 4000)] * 1000

    server = Server(lambda sock: Visit(Endless(plane)), plane, QUICK)
    client = connect(plane, server=server)
    client.sock.send(b"\0\0\0\1" + option(3))
    await asyncio.wait_for(server.idle(), 2)


@pytest.mark.parametrize(
    "data",
    [b"GARBAGE GARBAGE GARBAGE", b"\0\0\0\1" + b"IHAVEOPS" + bytes(8), b"\0\0\0\1IHAVEOPT\0\0\0\3\xff\xff\xff\xff"],
)
async def test_h1_h6_h8_drop(plane: FakePlane, data: bytes) -> None:
    client = connect(plane)
    client.sock.send(data)
    assert await client.read(18) == HELLO
    begin = asyncio.get_running_loop().time()
    try:
        assert await client.ended()
    except ConnectionResetError:
        pass
    assert asyncio.get_running_loop().time() - begin < 0.2


async def test_h18_h23_clients_that_leave(plane: FakePlane) -> None:
    for data in (b"", b"\0\0\0\1", b"\0\0\0\1" + option(7, b"1234")[:-2]):
        client = connect(plane)
        client.sock.send(data)
        client.sock.close()
        await asyncio.wait_for(client.server.idle(), 0.2)
    assert plane.connections == []


async def test_too_many_haggling(plane: FakePlane) -> None:
    first = connect(plane)
    second = connect(plane, server=first.server)
    third = connect(plane, server=first.server)
    assert await third.read(18) == b""
    assert await first.read(18) == HELLO and await second.read(18) == HELLO


async def test_too_many_connections_in_all(plane: FakePlane) -> None:
    first = connect(plane)
    server = first.server
    for client in (first, connect(plane, server=server)):
        client.sock.send(b"\0\0\0\1" + GO)
        await client.read(18 + 20 + 12 + 20)
    await asyncio.sleep(0.01)
    third = connect(plane, server=server)
    assert await third.read(18) == HELLO and server.connections == 3
    assert await connect(plane, server=server).read(18) == b""
    plane.hang_up(plane.connections[0])
    await asyncio.sleep(0.01)
    assert await connect(plane, server=server).read(18) == HELLO


async def test_a_failing_provider_ends_only_its_connection(plane: FakePlane) -> None:
    class Broken(Disk):
        async def list(self) -> Sequence[Listing]:
            raise RuntimeError("a bug")

    server = Server(lambda sock: Visit(Broken(plane)), plane, QUICK)
    client = connect(plane, server=server)
    client.sock.send(b"\0\0\0\1" + option(3))
    assert await client.read(18) == HELLO and await client.ended()
    assert await connect(plane, server=server).read(18) == HELLO


async def test_stop_says_shutdown_and_ends_the_silent(plane: FakePlane) -> None:
    talking = connect(plane, limits=Limits())
    silent = connect(plane, server=talking.server)
    talking.sock.send(b"\0\0\0\1")
    assert await talking.read(18) == HELLO and await silent.read(18) == HELLO
    stop = asyncio.create_task(talking.server.stop())
    await asyncio.sleep(0.05)
    talking.sock.send(GO)
    kind, text = await talking.reply()
    assert kind == Reply.ERR_SHUTDOWN and b"stopping" in text
    assert await talking.ended() and await silent.ended()
    await stop
    assert talking.server.connections == 0
    assert await connect(plane, server=talking.server).read(18) == b""


async def test_h19_plaintext_behind_starttls_drops(plane: FakePlane) -> None:
    client = connect(plane, TlsRule.OFFERED)
    client.sock.send(b"\0\0\0\1" + option(5) + GO)
    assert await client.read(18) == HELLO
    try:
        assert await client.ended()
    except ConnectionResetError:
        pass
    assert plane.tls == [] and plane.connections == []


async def test_tls_hand_over(plane: FakePlane) -> None:
    plane.tls_identity = "vm1"
    client = connect(plane, TlsRule.REQUIRED)
    client.sock.send(b"\0\0\0\1" + option(5))
    await client.read(18)
    assert await client.reply() == (ACK, b"")
    client.sock.send(b"client hello")
    await asyncio.sleep(0.05)
    [(sock, tls)] = plane.tls
    assert sock.recv(99) == b"client hello"
    tls.options.put_nowait(TlsOption(3, b""))
    tls.options.put_nowait(TlsOption(7, GO[16:]))
    await asyncio.sleep(0.05)
    (listed, then, _, _), (data, entered, volume, params) = tls.replies
    assert b"diskvm1" in listed and then is TlsAction.CONTINUE
    assert entered is TlsAction.ENTER and volume == 7 and params is not None and params.tflags == 1
    assert len(data) == 20 + 12 + 20 and client.server.connections == 1
    tls.closed.set_result(ConnectionEnd(0))
    await asyncio.wait_for(client.server.idle(), 1)


async def test_an_encrypted_client_that_drips_runs_into_the_total_limit(plane: FakePlane) -> None:
    client = connect(plane, TlsRule.REQUIRED)
    client.sock.send(b"\0\0\0\1" + option(5))
    await client.read(38)
    await asyncio.sleep(0.05)
    [(_, tls)] = plane.tls
    await asyncio.wait_for(client.server.idle(), 2)  # no option ever comes; only hanging up can end it
    assert tls.closed.done() and client.server.connections == 0


@pytest.mark.parametrize("what", ["failed handshake", "gone", "abort", "bad"])
async def test_tls_ends(plane: FakePlane, what: str) -> None:
    plane.tls_identity = "!" if what == "failed handshake" else "vm1"
    client = connect(plane, TlsRule.REQUIRED)
    client.sock.send(b"\0\0\0\1" + option(5))
    await client.read(38)
    await asyncio.sleep(0.05)
    [(_, tls)] = plane.tls
    if what != "failed handshake":
        words = {"gone": None, "abort": TlsOption(2, b""), "bad": TlsOption(1, b"a\0b")}
        tls.options.put_nowait(words[what])
    await asyncio.wait_for(client.server.idle(), 1)
    assert plane.connections == []


async def test_over_a_listening_socket(plane: FakePlane) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(lambda sock: Visit(Disk(plane)), plane, QUICK)
    task = asyncio.create_task(server.serve(listener))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(b"\0\0\0\1" + option(3))
    assert await reader.readexactly(18) == HELLO
    assert len(await reader.readexactly(28 + 20)) == 48
    writer.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    listener.close()


@pytest.mark.parametrize(
    "case",
    [
        test_go_hands_the_socket_over_and_leaves_early_requests_in_it,
        test_h19_plaintext_behind_starttls_drops,
        test_tls_hand_over,
        test_stop_says_shutdown_and_ends_the_silent,
        test_over_a_listening_socket,
    ],
)
def test_the_same_on_uvloop(case: Callable[[FakePlane], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(case(FakePlane()))
