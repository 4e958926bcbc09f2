"""TLS connections: the handshake, options one at a time, the transmission phase behind GO; what ends them."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import struct
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import (
    ConnectionParams,
    TlsAction,
    TlsConfig,
    TlsConnection,
    TlsContext,
    TlsOption,
    VolumeLimits,
)
from tests.lib import nbdwords as w
from tests.lib.pki import client_context
from tests.lib.rawio import Style, Transmission
from tests.lib.rawnbd import Facts, Haggled, Stream, option_bytes
from tests.unit.plane_rig import ALL_FLAGS, Pair, Rig, eventually, rig, running

__all__ = ["rig"]
SIZE = 1 << 20


class Peer:
    """Both ends of one connection: our client's TLS socket and the plane's haggling."""

    def __init__(self, rig: Rig, context: TlsContext, timeout_ms: int = 5000, pair: Pair = socket.socketpair) -> None:
        self.rig = rig
        self.raw, theirs = pair()
        self.raw.settimeout(10)
        self.server: TlsConnection = rig.call(rig.plane.open_tls, theirs.fileno(), context, timeout_ms)
        theirs.close()
        self.sock: Any = None

    def handshake(self, client: ssl.SSLContext) -> None:
        self.sock = client.wrap_socket(self.raw, server_hostname="localhost")

    def ready(self) -> str:
        return self.rig.wait(self.server.ready())

    def option(self) -> TlsOption:
        return self.rig.wait(self.server.option())

    def reply(self, data: bytes, action: TlsAction = TlsAction.CONTINUE, **more: Any) -> None:
        self.rig.call(self.server.reply, data, action, **more)

    def end(self) -> int:
        async def wait() -> int:
            return (await self.server.closed).errno

        return self.rig.wait(wait())

    def receive(self, length: int) -> bytes:
        got = b""
        while len(got) < length and (more := self.sock.recv(length - len(got))):
            got += more
        return got


@pytest.fixture
def server(rig: Rig, pki: Path) -> TlsContext:
    return rig.plane.load_tls(files(pki))


def files(pki: Path, **more: Any) -> TlsConfig:
    names = {"ca_file": "ca-cert.pem", "cert_file": "server-cert.pem", "key_file": "server-key.pem"}
    return TlsConfig(**{key: str(pki / name) for key, name in names.items()}, **more)


def entered(
    rig: Rig,
    server: TlsContext,
    pki: Path,
    style: Style = "simple",
    behind: bytes = b"",
    pair: Pair = socket.socketpair,
) -> Transmission:
    """A client past GO; `behind` is sent in one record with its GO."""
    peer = Peer(rig, server, pair=pair)
    waiting = rig.start(peer.server.ready())
    peer.handshake(client_context(pki, "vm1"))
    assert waiting.result(10) == "vm1"
    peer.sock.sendall(option_bytes(w.OPT_GO, b"\0\0\0\0\0\0") + behind)
    assert peer.option() == TlsOption(w.OPT_GO, b"\0\0\0\0\0\0")
    params = ConnectionParams(structured=style != "simple", extended=style == "extended", tflags=ALL_FLAGS)
    peer.reply(b"welcome", TlsAction.ENTER, volume=rig.volume(SIZE), params=params)
    assert peer.receive(7) == b"welcome"
    one = Transmission(
        Stream(peer.sock, 10), Haggled(style != "simple", style == "extended", {}, Facts(SIZE, ALL_FLAGS))
    )
    one.peer = peer  # type: ignore[attr-defined]
    return one


def test_options_one_at_a_time(rig: Rig, server: TlsContext, pki: Path) -> None:
    peer = Peer(rig, server)
    waiting = rig.start(peer.server.ready())
    peer.handshake(client_context(pki, "vm2"))
    assert waiting.result(10) == "vm2"
    options = [TlsOption(100 + i, os.urandom(length)) for i, length in enumerate([0, 1, 5000, 65536])]
    peer.sock.sendall(b"".join(option_bytes(one.option, one.payload) for one in options))
    for one in options:
        assert peer.option() == one
        answer = os.urandom(200_000 if one.option == 101 else 20)
        peer.reply(answer)
        assert peer.receive(len(answer)) == answer
    peer.sock.sendall(option_bytes(w.OPT_ABORT))
    assert peer.option().option == w.OPT_ABORT
    peer.reply(b"bye", TlsAction.CLOSE)
    assert peer.receive(100) == b"bye", "the answer, then close_notify"
    assert peer.end() == 0


def test_options_of_a_client_that_does_not_read_wait(rig: Rig, server: TlsContext, pki: Path) -> None:
    """An answer that TLS has no room for is not lost to the next one: the next option is not taken yet."""
    peer = Peer(rig, server)
    waiting = rig.start(peer.server.ready())
    peer.handshake(client_context(pki, "vm2"))
    waiting.result(10)
    peer.sock.sendall(b"".join(option_bytes(100 + i) for i in range(8)))
    answers = [os.urandom(3_000_000) for _ in range(8)]
    taken = 0
    with pytest.raises(TimeoutError):  # more than the sockets and TLS hold: the client must read first
        while True:
            waiting_option: Future[TlsOption] = rig.start(peer.server.option())
            assert waiting_option.result(1).option == 100 + taken
            peer.reply(answers[taken])
            taken += 1
    assert 1 <= taken < 8
    for i, answer in enumerate(answers):
        if i >= taken:
            if i > taken:
                waiting_option = rig.start(peer.server.option())
            assert waiting_option.result(10).option == 100 + i
            peer.reply(answer)
        assert peer.receive(len(answer)) == answer


@pytest.mark.parametrize("style", ["simple", "structured", "extended"])
def test_transmission_through_tls(rig: Rig, server: TlsContext, pki: Path, style: Style) -> None:
    client = entered(rig, server, pki, style)
    data = os.urandom(700_000)
    client.write(123, data)
    assert client.read(123, len(data)) == data
    cookies = [client.send(w.CMD_WRITE, 3000 * i, 3000, payload=bytes([i]) * 3000) for i in range(100)]
    for cookie in cookies:
        client.wait(cookie).check()
    assert client.read(3000 * 50, 6000) == bytes([50]) * 3000 + bytes([51]) * 3000
    client.flush()
    client.disconnect()
    assert client.peer.end() == 0  # type: ignore[attr-defined]


def test_limits_hold_back_what_comes_through_tls(rig: Rig, server: TlsContext, pki: Path) -> None:
    """What is decrypted already and what is not yet, whole and in pieces, until the limits are gone."""
    client = entered(rig, server, pki)
    rig.wait(rig.plane.limit_volume(1, VolumeLimits(iops=1, burst_us=1000)))
    data = [os.urandom(30_000 + 1000 * i) for i in range(4)]
    cookies = [client.send(w.CMD_WRITE, 65536 * i, len(part), payload=part) for i, part in enumerate(data)]
    eventually("one waits", lambda: rig.stats(1).delayed >= 1)
    rig.wait(rig.plane.limit_volume(1, VolumeLimits()))
    for cookie in cookies:
        client.wait(cookie).check()
    for i, part in enumerate(data):
        assert client.read(65536 * i, len(part)) == part


def test_bytes_behind_go_are_requests(rig: Rig, server: TlsContext, pki: Path) -> None:
    write = struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_WRITE, 1, 0, 5) + b"early"
    client = entered(rig, server, pki, behind=write)
    assert client.stream.recv(16) == struct.pack(">IIQ", w.SIMPLE_REPLY_MAGIC, 0, 1)
    assert client.read(0, 5) == b"early"


def failure(rig: Rig, peer: Peer) -> None:
    with pytest.raises(ConnectionError):
        peer.ready()
    assert peer.end() != 0


def test_no_tls_at_all(rig: Rig, server: TlsContext) -> None:
    peer = Peer(rig, server)
    peer.raw.sendall(option_bytes(w.OPT_GO, bytes(6)) * 10)
    failure(rig, peer)


@pytest.mark.parametrize("who", [None, "stranger", "expired"])
def test_clients_that_cannot_prove_who_they_are(rig: Rig, server: TlsContext, pki: Path, who: str | None) -> None:
    peer = Peer(rig, server)
    waiting: Future[str] = rig.start(peer.server.ready())
    with pytest.raises((ssl.SSLError, ConnectionError)):
        peer.handshake(client_context(pki, who))
        peer.sock.recv(1)  # TLS 1.3 tells after the handshake
        raise ConnectionError("a clean end, unexpectedly early")
    with pytest.raises(ConnectionError):
        waiting.result(10)


def test_silent_client_is_cut_in_time(rig: Rig, server: TlsContext) -> None:
    peer = Peer(rig, server, timeout_ms=300)
    start = time.monotonic()
    failure(rig, peer)
    assert 0.2 < time.monotonic() - start < 8
    assert peer.raw.recv(1) == b""


@pytest.mark.parametrize("bad", [b"\0" * 16, option_bytes(7, b"", length=65537), option_bytes(7, b"", magic=5)])
def test_malformed_options(rig: Rig, server: TlsContext, pki: Path, bad: bytes) -> None:
    peer = Peer(rig, server)
    waiting = rig.start(peer.server.ready())
    peer.handshake(client_context(pki, "vm1"))
    waiting.result(10)
    asked = rig.start(peer.server.option())
    peer.sock.sendall(bad)
    with pytest.raises(ConnectionError):
        asked.result(10)
    assert peer.end() == errno.EPROTO
    assert peer.receive(1) == b""


def test_client_leaves_while_haggling(rig: Rig, server: TlsContext, pki: Path) -> None:
    peer = Peer(rig, server)
    waiting = rig.start(peer.server.ready())
    peer.handshake(client_context(pki, "vm1"))
    waiting.result(10)
    peer.sock.sendall(option_bytes(5, b"abc")[:-1])
    peer.sock.close()
    assert peer.end() == errno.ECONNRESET
    peer.reply(b"nobody listens")


def test_volume_close_says_goodbye(rig: Rig, server: TlsContext, pki: Path) -> None:
    client = entered(rig, server, pki)
    client.write(0, b"x")
    rig.wait(rig.plane.close_volume(1))
    assert client.peer.receive(1) == b"", "close_notify, not a torn stream"  # type: ignore[attr-defined]
    assert client.peer.end() == errno.ESHUTDOWN  # type: ignore[attr-defined]


def test_entering_a_closed_volume_is_refused(rig: Rig, server: TlsContext, pki: Path) -> None:
    peer = Peer(rig, server)
    waiting = rig.start(peer.server.ready())
    peer.handshake(client_context(pki, "vm1"))
    waiting.result(10)
    peer.sock.sendall(option_bytes(w.OPT_GO, bytes(6)))
    peer.option()
    with pytest.raises(PlaneError) as caught:
        peer.reply(b"", TlsAction.ENTER, volume=9, params=ConnectionParams())
    assert caught.value.errno == errno.ENOENT
    peer.reply(b"sorry", TlsAction.CLOSE)
    assert peer.receive(9) == b"sorry"


def test_bad_files_are_named(rig: Rig, pki: Path, tmp_path: Path) -> None:
    with pytest.raises(PlaneError, match="nowhere"):
        rig.plane.load_tls(TlsConfig(psk_file=str(tmp_path / "nowhere")))
    (tmp_path / "bad.pem").write_text("not a key")
    with pytest.raises(PlaneError, match=r"bad\.pem"):
        rig.plane.load_tls(TlsConfig(cert_file=str(tmp_path / "bad.pem"), key_file=str(pki / "server-key.pem")))


def test_context_may_be_dropped_under_live_connections(rig: Rig, server: TlsContext, pki: Path) -> None:
    client = entered(rig, server, pki)
    server.close()
    client.write(0, b"still here")
    assert client.read(0, 10) == b"still here"


def test_plane_closes_under_haggling_clients(pki: Path) -> None:
    with running(reactors=2) as rig:
        context = rig.plane.load_tls(files(pki))
        peers = [Peer(rig, context) for _ in range(4)]
        waiting = rig.start(peers[0].server.ready())
        peers[0].handshake(client_context(pki, "vm1"))
        waiting.result(10)
        peers[0].sock.sendall(option_bytes(w.OPT_GO, bytes(6)))
        peers[0].option()
        closed = [asyncio.run_coroutine_threadsafe(_end(peer), rig.loop) for peer in peers]
    assert all(one.done() for one in closed)


async def _end(peer: Peer) -> int:
    return (await peer.server.closed).errno
