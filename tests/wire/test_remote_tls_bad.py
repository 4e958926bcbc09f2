"""Servers that misbehave around TLS: injected plaintext, alerts, ends, words that nobody asked for. Each is refused, or
loses its connection, with a sentence that says why; nothing it slipped in is taken for the server's word."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdvvol.model.errors import Code
from tests.lib import nbdwords as w
from tests.lib.fakeserver import Gone, Wire
from tests.wire.remote import using
from tests.wire.test_remote_tls import only_ca, refused

pytestmark = pytest.mark.timeout(60)
SIZE = 1 << 20
FLAGS = w.TFLAG_HAS_FLAGS | w.TFLAG_SEND_FLUSH | w.TFLAG_SEND_FUA
Script = Callable[[socket.socket, int], None]
"""What a server does with a connection, whose number comes second."""


def recv(sock: socket.socket, length: int) -> bytes:
    """Exactly so much. Raises Gone."""
    return Wire(sock, "simple").recv(length)


def option(sock: socket.socket) -> tuple[int, bytes]:
    """The client's next option."""
    magic, number, length = struct.unpack(">QII", recv(sock, 16))
    assert magic == w.IHAVEOPT
    return number, recv(sock, length)


def reply(number: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", w.OPTION_REPLY_MAGIC, number, kind, len(body)) + body


def begin(sock: socket.socket, behind: bytes = b"") -> None:
    """Greet, and acknowledge STARTTLS together with `behind`."""
    sock.sendall(struct.pack(">QQH", w.NBDMAGIC, w.IHAVEOPT, 3))
    recv(sock, 4)
    assert option(sock) == (w.OPT_STARTTLS, b"")
    sock.sendall(reply(w.OPT_STARTTLS, w.REP_ACK) + behind)


class Server:
    """Greets, acknowledges STARTTLS together with `behind`, and leaves the rest to a script."""

    def __init__(self, script: Script, behind: bytes = b"") -> None:
        self.script, self.behind = script, behind
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"nbds://127.0.0.1:{self.listener.getsockname()[1]}/e"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        number = 0
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(20)
            with contextlib.suppress(OSError, Gone), sock:  # the client has had enough
                begin(sock, self.behind)
                self.script(sock, number)
            number += 1

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(20)


@contextlib.contextmanager
def serving(script: Script, behind: bytes = b"") -> Iterator[Server]:
    server = Server(script, behind)
    try:
        yield server
    finally:
        server.close()


def secure(sock: socket.socket, pki: Path, *, client: bool = False) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(pki / "ca-cert.pem")
    return context.wrap_socket(sock, server_side=True)


def haggle(tls: ssl.SSLSocket, behind: bytes = b"") -> None:
    """As a server of few talents does, up to GO; `behind` comes with its acknowledgement."""
    while True:
        number, _ = option(tls)
        if number == w.OPT_GO:
            export = struct.pack(">HQH", w.INFO_EXPORT, SIZE, FLAGS)
            tls.sendall(reply(number, w.REP_INFO, export) + reply(number, w.REP_ACK) + behind)
            return
        tls.sendall(reply(number, w.REP_ERR_UNSUP))


def answer(tls: ssl.SSLSocket) -> None:
    """Every request, until the client leaves: reads have zeros."""
    wire = Wire(tls, "simple")
    while (asked := wire.request()).command != w.CMD_DISC:
        wire.send(wire.simple(asked, bytes(asked.length) if asked.command == w.CMD_READ else b""))


def trust(pki: Path) -> dict[str, str]:
    return {"certs": str(only_ca(pki)), "hostname": "localhost"}


def test_plaintext_behind_the_acknowledgement_is_no_servers_word(pki: Path) -> None:
    """Somebody on the wire puts a whole answer to GO behind STARTTLS's acknowledgement."""
    export = struct.pack(">HQH", w.INFO_EXPORT, SIZE, FLAGS)
    injected = reply(w.OPT_GO, w.REP_INFO, export) + reply(w.OPT_GO, w.REP_ACK)

    def script(sock: socket.socket, _: int) -> None:
        secure(sock, pki)

    with serving(script, behind=injected) as server:
        refused(Code.DENIED, "127.0.0.1", server.uri, tls=trust(pki))


def test_a_server_that_wants_to_know_who_we_are_says_so_by_an_alert(pki: Path) -> None:
    """In TLS 1.3 the alert comes after a handshake that looked well; its words reach the operator."""

    def script(sock: socket.socket, _: int) -> None:
        secure(sock, pki, client=True)

    with serving(script) as server:
        refused(Code.DENIED, "certificate required", server.uri, tls=trust(pki))


@pytest.mark.parametrize("when", ["at once", "in the handshake", "in an option"])
def test_a_server_that_hangs_up(pki: Path, when: str) -> None:
    def script(sock: socket.socket, _: int) -> None:
        if when == "in the handshake":
            sock.recv(100)
        elif when == "in an option":
            option(secure(sock, pki))

    with serving(script) as server:
        refused(Code.DENIED, "closed the connection", server.uri, tls=trust(pki))


def test_a_goodbye_in_the_middle_of_the_haggling(pki: Path) -> None:
    def script(sock: socket.socket, _: int) -> None:
        tls = secure(sock, pki)
        option(tls)
        tls.unwrap()

    with serving(script) as server:
        refused(Code.DENIED, "closed the connection", server.uri, tls=trust(pki))


def test_words_behind_go_are_replies_to_nothing(pki: Path) -> None:
    """The first connection for I/O brings a reply that nobody asked for: it is lost, and the next one serves."""
    reply_to_nothing = struct.pack(">IIQ", w.SIMPLE_REPLY_MAGIC, 0, 0x4711)

    def script(sock: socket.socket, number: int) -> None:
        tls = secure(sock, pki)
        haggle(tls, behind=reply_to_nothing if number == 1 else b"")  # the first of all only looks at the export
        answer(tls)

    with serving(script) as server, using(server.uri, tls=trust(pki), connections=1) as far:
        client = far.client()
        assert client.read(0, 4096) == bytes(4096)
        assert far.stats.lost == 1 and not far.failed


def test_an_alert_in_the_transmission_phase_costs_one_connection(pki: Path) -> None:
    def script(sock: socket.socket, number: int) -> None:
        tls = secure(sock, pki)
        haggle(tls)
        if number == 1:
            recv(tls, 28)
            raw = socket.socket(fileno=tls.detach())
            with raw:
                raw.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # an alert that is not even encrypted
                raw.recv(1 << 16)
        else:
            answer(tls)

    with serving(script) as server, using(server.uri, tls=trust(pki), connections=1) as far:
        client = far.client()
        assert client.read(0, 4096) == bytes(4096)
        stats = far.stats  # how often it is asked again depends on when the connection is seen to be gone
        assert stats.lost == 1 and 1 <= stats.again <= 2 and not far.failed


def test_over_a_unix_socket_the_certificates_name_must_be_said(pki: Path, tmp_path: Path) -> None:
    """Any certificate of that authority would do otherwise; nothing is sent to such a server."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        heard: list[bytes] = []

        def greet() -> None:
            sock, _ = listener.accept()
            with sock:
                begin(sock)
                heard.append(sock.recv(100))

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        uri = f"nbds+unix:///e?socket={path}"
        refused(Code.CONFIG, "any certificate would do", uri, tls={"certs": str(only_ca(pki))})
        thread.join(10)
        assert heard == [b""], "it was spoken to"
