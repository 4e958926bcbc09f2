"""A raw NBD client: every byte is the test's, every reply is checked against the specification.

`Haggle` is the handshake, piece by piece, so that a test can send any of them wrong; `open_export` does it right
and returns a `rawio.Transmission`. Addresses are a path (unix socket) or a (host, port) pair. Nothing here waits
for ever: each receive has a time limit and says what it was waiting for.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lib import nbdwords as w

Address = Path | str | tuple[str, int]
TIMEOUT_S = 20.0


class Closed(Exception):
    """The server closed or reset the connection; `partial` is what came before."""

    def __init__(self, partial: bytes = b"") -> None:
        super().__init__(f"connection closed by the server after {len(partial)} bytes of what was awaited")
        self.partial = partial


class Stream:
    """Exact sends and receives over one socket, plain or TLS.

    A `polite` stream takes in replies while a send has to wait, so that client and server never wait for each other;
    it is for one thread. Set it False to send from one thread and receive in another, or never to receive at all."""

    def __init__(self, sock: socket.socket, timeout_s: float = TIMEOUT_S) -> None:
        self.sock = sock
        self.sock.settimeout(timeout_s)
        self.polite = not isinstance(sock, ssl.SSLSocket)
        self._early = bytearray()

    @classmethod
    def connect(cls, address: Address, timeout_s: float = TIMEOUT_S) -> Stream:
        """Connect to a unix socket path or a (host, port)."""
        if isinstance(address, tuple):
            sock = socket.create_connection(address, timeout=timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect(os.fspath(address))
        return cls(sock, timeout_s)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it. Raises Closed when the server is gone."""
        try:
            if self.polite:
                self._send_politely(memoryview(data))
            else:
                self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as error:
            raise Closed from error

    def _send_politely(self, data: memoryview) -> None:
        while data:
            reading, writing, _ = select.select([self.sock], [self.sock], [], self.sock.gettimeout())
            if writing:
                data = data[self.sock.send(data, socket.MSG_DONTWAIT) :]
            elif reading:
                more = self.sock.recv(1 << 20)
                if not more:
                    raise BrokenPipeError
                self._early += more
            else:
                raise TimeoutError(f"the server took none of {len(data)} bytes")

    def recv(self, length: int) -> bytes:
        """Receive exactly `length` bytes. Raises Closed at the end of the stream."""
        got = bytearray(length)
        view = memoryview(got)
        have = min(length, len(self._early))
        view[:have] = self._early[:have]
        del self._early[:have]
        while have < length:
            try:
                count = self.sock.recv_into(view[have:])
            except (ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                count = 0
            except TimeoutError as error:
                raise TimeoutError(f"got {have} of {length} bytes: {bytes(got[:have])[:64].hex()}") from error
            if count == 0:
                raise Closed(bytes(got[:have]))
            have += count
        return bytes(got)

    def wait_closed(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """Wait until the server closes; return the bytes that still came. Raises TimeoutError if it does not."""
        rest, self._early = self._early, bytearray()
        end = time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the server did not close within {timeout_s} s; it sent {bytes(rest[:64]).hex()}")
            self.sock.settimeout(left)
            try:
                more = self.sock.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return bytes(rest)
            if not more:
                return bytes(rest)
            rest += more

    def expect_silence(self, seconds: float) -> None:
        """Fail if the server sends or closes within `seconds`."""
        assert not self._early, f"expected silence, got {bytes(self._early[:64]).hex()}"
        before = self.sock.gettimeout()
        self.sock.settimeout(seconds)
        try:
            got = self.sock.recv(65536)
        except TimeoutError:
            return
        finally:
            self.sock.settimeout(before)
        raise AssertionError(f"expected silence, got {got[:64].hex() or 'end of stream'}")

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close at once, by RST on TCP."""
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self.sock.close()


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One option reply."""

    option: int
    type: int
    payload: bytes

    @property
    def is_error(self) -> bool:
        """Whether it is one of the REP_ERR_ types."""
        return bool(self.type & w.REP_ERROR_BIT)

    @property
    def text(self) -> str:
        """The human's message of an error reply. Raises UnicodeDecodeError when it is not UTF-8."""
        return self.payload.decode()


@dataclass(slots=True)
class Facts:
    """What GO, INFO or EXPORT_NAME said about an export."""

    size: int = 0
    flags: int = 0
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None


@dataclass(slots=True)
class Haggled:
    """What was agreed, for the transmission phase."""

    structured: bool = False
    extended: bool = False
    contexts: dict[str, int] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)


class OptionRefused(Exception):
    """An option was answered by an error reply."""

    def __init__(self, reply: OptionReply) -> None:
        super().__init__(f"option {reply.option} refused with {reply.type - w.REP_ERROR_BIT}: {reply.text}")
        self.reply = reply


def option_bytes(option: int, payload: bytes = b"", *, length: int | None = None, magic: int = w.IHAVEOPT) -> bytes:
    """An option as it goes over the wire; `length` and `magic` may lie."""
    return struct.pack(">QII", magic, option, len(payload) if length is None else length) + payload


def info_payload(name: str | bytes, infos: Sequence[int] = ()) -> bytes:
    """Payload of INFO and GO."""
    raw = name.encode() if isinstance(name, str) else name
    return struct.pack(">I", len(raw)) + raw + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_payload(name: str | bytes, queries: Sequence[str | bytes]) -> bytes:
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    raw = name.encode() if isinstance(name, str) else name
    out = bytearray(struct.pack(">I", len(raw)) + raw + struct.pack(">I", len(queries)))
    for query in queries:
        text = query.encode() if isinstance(query, str) else query
        out += struct.pack(">I", len(text)) + text
    return bytes(out)


class Haggle:
    """The handshake, one piece at a time."""

    def __init__(self, address: Address, timeout_s: float = TIMEOUT_S) -> None:
        self.stream = Stream.connect(address, timeout_s)
        self.agreed = Haggled()

    def __enter__(self) -> Haggle:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def greeting(self) -> int:
        """Receive the server's hello; return its handshake flags."""
        magic, second, flags = struct.unpack(">QQH", self.stream.recv(18))
        assert magic == w.NBDMAGIC, hex(magic)
        assert second == w.IHAVEOPT, hex(second)
        return int(flags)

    def client_flags(self, flags: int = w.FLAG_FIXED_NEWSTYLE | w.FLAG_NO_ZEROES) -> None:
        """Send the client flags."""
        self.stream.send(struct.pack(">I", flags))

    def begin(self, flags: int = w.FLAG_FIXED_NEWSTYLE | w.FLAG_NO_ZEROES) -> Haggle:
        """Greeting and client flags, as every polite client does."""
        offered = self.greeting()
        assert offered == w.FLAG_FIXED_NEWSTYLE | w.FLAG_NO_ZEROES, f"handshake flags {offered:#x}"
        self.client_flags(flags)
        return self

    def send_option(
        self, option: int, payload: bytes = b"", *, length: int | None = None, magic: int = w.IHAVEOPT
    ) -> None:
        """Send one option; see option_bytes."""
        self.stream.send(option_bytes(option, payload, length=length, magic=magic))

    def reply(self, option: int) -> OptionReply:
        """Receive one reply to `option`, its framing checked."""
        magic, replied, kind, length = struct.unpack(">QIII", self.stream.recv(20))
        assert magic == w.OPTION_REPLY_MAGIC, hex(magic)
        assert replied == option, f"reply to option {replied}, sent {option}"
        assert length <= 65536, f"reply of {length} bytes"
        reply = OptionReply(replied, kind, self.stream.recv(length))
        if reply.is_error:
            assert len(reply.text.encode()) <= w.STRING_MAX
            assert "\0" not in reply.text
        if kind == w.REP_ACK:
            assert length == 0, "ACK carries no payload"
        return reply

    def replies(self, option: int) -> list[OptionReply]:
        """Receive replies to `option` up to its ACK or error."""
        got = []
        while True:
            got.append(self.reply(option))
            if got[-1].is_error or got[-1].type == w.REP_ACK:
                return got

    def ask(self, option: int, payload: bytes = b"") -> list[OptionReply]:
        """Send an option and receive its replies."""
        self.send_option(option, payload)
        return self.replies(option)

    def demand(self, option: int, payload: bytes = b"") -> list[OptionReply]:
        """As ask, without the ACK. Raises OptionRefused on an error reply."""
        got = self.ask(option, payload)
        if got[-1].is_error:
            raise OptionRefused(got[-1])
        return got[:-1]

    def refused(self, option: int, payload: bytes = b"") -> OptionReply:
        """Send an option that must be answered by exactly one error reply; return it."""
        got = self.ask(option, payload)
        assert got[-1].is_error, f"option {option} was accepted"
        assert len(got) == 1, f"{len(got) - 1} replies before the error"
        return got[0]

    def list_exports(self) -> dict[str, str]:
        """LIST: name → description."""
        exports = {}
        for reply in self.demand(w.OPT_LIST):
            assert reply.type == w.REP_SERVER
            (length,) = struct.unpack_from(">I", reply.payload)
            assert 4 + length <= len(reply.payload)
            exports[reply.payload[4 : 4 + length].decode()] = reply.payload[4 + length :].decode()
        return exports

    def structured(self) -> None:
        """Negotiate structured replies."""
        assert self.demand(w.OPT_STRUCTURED_REPLY) == []
        self.agreed.structured = True

    def extended(self) -> None:
        """Negotiate extended headers."""
        assert self.demand(w.OPT_EXTENDED_HEADERS) == []
        self.agreed.structured = self.agreed.extended = True

    def meta(self, option: int, name: str, queries: Sequence[str]) -> dict[str, int]:
        """LIST_META_CONTEXT or SET_META_CONTEXT: name → id."""
        found: dict[str, int] = {}
        for reply in self.demand(option, meta_payload(name, queries)):
            assert reply.type == w.REP_META_CONTEXT
            (number,) = struct.unpack_from(">I", reply.payload)
            found[reply.payload[4:].decode()] = number
        if option == w.OPT_SET_META_CONTEXT:
            assert len(set(found.values())) == len(found), "context ids must be unique"
            self.agreed.contexts = found
        return found

    def facts(self, option: int, name: str, infos: Sequence[int] = (w.INFO_BLOCK_SIZE,)) -> Facts:
        """INFO or GO. Raises OptionRefused."""
        facts = Facts()
        seen = []
        for reply in self.demand(option, info_payload(name, infos)):
            assert reply.type == w.REP_INFO, reply
            (kind,) = struct.unpack_from(">H", reply.payload)
            body = reply.payload[2:]
            seen.append(kind)
            if kind == w.INFO_EXPORT:
                facts.size, facts.flags = struct.unpack(">QH", body)
            elif kind == w.INFO_NAME:
                facts.name = body.decode()
            elif kind == w.INFO_DESCRIPTION:
                facts.description = body.decode()
            elif kind == w.INFO_BLOCK_SIZE:
                facts.block_sizes = struct.unpack(">III", body)
        assert w.INFO_EXPORT in seen, "INFO_EXPORT must come before the ACK"
        assert len(seen) == len(set(seen)), f"an info type came twice: {seen}"
        assert facts.flags & w.TFLAG_HAS_FLAGS
        if not self.agreed.structured:
            assert not facts.flags & w.TFLAG_SEND_DF, "SEND_DF without structured replies"
        if not self.agreed.extended:
            assert not facts.flags & w.TFLAG_BLOCK_STATUS_PAYLOAD, "payload status without extended headers"
        self.agreed.facts = facts
        return facts

    def export_name(self, name: str | bytes, *, zeroes: bool = False) -> Facts:
        """EXPORT_NAME; `zeroes` when NO_ZEROES was not agreed. Raises Closed when refused."""
        self.send_option(w.OPT_EXPORT_NAME, name.encode() if isinstance(name, str) else name)
        size, flags = struct.unpack(">QH", self.stream.recv(10))
        if zeroes:
            assert self.stream.recv(124) == bytes(124)
        self.agreed.facts = Facts(size, flags)
        return self.agreed.facts

    def starttls(self, context: ssl.SSLContext, hostname: str = "localhost") -> ssl.SSLSocket:
        """STARTTLS and the TLS handshake. Raises OptionRefused, or ssl.SSLError."""
        assert self.demand(w.OPT_STARTTLS) == []
        secure = context.wrap_socket(self.stream.sock, server_hostname=hostname, suppress_ragged_eofs=False)
        self.stream = Stream(secure)
        self.agreed = Haggled()
        return secure

    def abort(self) -> None:
        """ABORT, its ACK, and the server's close."""
        assert self.ask(w.OPT_ABORT)[-1].type == w.REP_ACK
        self.stream.half_close()
        assert self.stream.wait_closed() == b""
