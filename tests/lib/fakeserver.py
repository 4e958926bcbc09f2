"""An NBD server's transmission phase, to test the client: one that behaves, and the parts of one that does not.

`Wire` reads requests and writes whatever a test likes. `FakeServer` serves memory over any number of Wires, keeps apart
what is durable and what only its cache holds, and forgets the latter at `reboot`. Numbers are typed from the
specification (nbdwords), never taken from the product.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.lib import nbdwords as w
from tests.lib.rawio import Style

ALL_FLAGS = (
    w.TFLAG_HAS_FLAGS
    | w.TFLAG_SEND_FLUSH
    | w.TFLAG_SEND_FUA
    | w.TFLAG_SEND_TRIM
    | w.TFLAG_SEND_WRITE_ZEROES
    | w.TFLAG_CAN_MULTI_CONN
    | w.TFLAG_SEND_CACHE
    | w.TFLAG_SEND_FAST_ZERO
)
CONTEXT = 0x2A


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


class Gone(Exception):
    """The client closed its side."""


class Wire:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, style: Style) -> None:
        self.sock = sock
        self.style = style
        self.lock = threading.Lock()

    def recv(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                piece = self.sock.recv(length - len(data))
            except OSError as error:
                raise Gone from error
            if not piece:
                raise Gone
            data += piece
        return data

    def request(self) -> Asked:
        """The next whole request."""
        if self.style == "extended":
            magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQQ", self.recv(32))
            assert magic == w.EXTENDED_REQUEST_MAGIC, hex(magic)
            payload = bool(flags & w.CMD_FLAG_PAYLOAD_LEN)
            assert payload == (command == w.CMD_WRITE), "PAYLOAD_LEN belongs to WRITE, and always"
            flags &= ~w.CMD_FLAG_PAYLOAD_LEN
        else:
            magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.recv(28))
            assert magic == w.REQUEST_MAGIC, hex(magic)
            payload = command == w.CMD_WRITE
        return Asked(command, flags, cookie, offset, length, self.recv(length) if payload else b"")

    def send(self, data: bytes) -> None:
        with self.lock:
            try:
                self.sock.sendall(data)
            except OSError as error:
                raise Gone from error

    def simple(self, asked: Asked, data: bytes = b"", error: int = 0) -> bytes:
        return struct.pack(">IIQ", w.SIMPLE_REPLY_MAGIC, error, asked.cookie) + data

    def chunk(self, asked: Asked, kind: int, payload: bytes = b"", *, done: bool = False) -> bytes:
        flags = w.CHUNK_DONE if done else 0
        if self.style == "extended":
            head = struct.pack(">IHHQQQ", w.EXTENDED_REPLY_MAGIC, flags, kind, asked.cookie, asked.offset, len(payload))
        else:
            head = struct.pack(">IHHQI", w.STRUCTURED_REPLY_MAGIC, flags, kind, asked.cookie, len(payload))
        return head + payload

    def data(self, asked: Asked, offset: int, data: bytes, *, done: bool = False) -> bytes:
        return self.chunk(asked, w.CHUNK_OFFSET_DATA, struct.pack(">Q", offset) + data, done=done)

    def hole(self, asked: Asked, offset: int, length: int, *, done: bool = False) -> bytes:
        return self.chunk(asked, w.CHUNK_OFFSET_HOLE, struct.pack(">QI", offset, length), done=done)

    def status(self, asked: Asked, extents: Sequence[tuple[int, int]], *, context: int = CONTEXT) -> bytes:
        if self.style == "extended":
            body = struct.pack(">II", context, len(extents)) + b"".join(struct.pack(">QQ", *one) for one in extents)
            return self.chunk(asked, w.CHUNK_BLOCK_STATUS_EXT, body, done=True)
        body = struct.pack(">I", context) + b"".join(struct.pack(">II", *one) for one in extents)
        return self.chunk(asked, w.CHUNK_BLOCK_STATUS, body, done=True)

    def ok(self, asked: Asked) -> bytes:
        """Success of a request without content."""
        if self.style == "extended":
            return self.chunk(asked, w.CHUNK_NONE, done=True)
        return self.simple(asked)

    def error(self, asked: Asked, number: int, text: str = "") -> bytes:
        if self.style == "simple":
            return self.simple(asked, error=number)
        raw = text.encode()
        return self.chunk(asked, w.CHUNK_ERROR, struct.pack(">IH", number, len(raw)) + raw, done=True)

    def close(self) -> None:
        """Hang up, whatever is under way."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


Handler = Callable[["FakeServer", Wire, Asked], "list[bytes] | None"]
"""A test's own answer to a request; None: the server answers as it should."""


@dataclass
class FakeServer:
    """Memory behind NBD. `asked` is every request in the order of arrival, of all connections."""

    size: int = 1 << 20
    style: Style = "structured"
    tflags: int = ALL_FLAGS
    block: int = 1
    handler: Handler | None = None
    jumble: int | None = None
    """A seed: answers are cut into chunks, shuffled and mixed."""
    payload_max: int = 32 << 20
    wires: list[Wire] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bytes = bytearray(self.size)
        self.durable = bytes(self.size)
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []
        self.random = random.Random(self.jumble)

    def connect(self) -> socket.socket:
        """The client's end of a new connection, served by a thread of its own."""
        mine, theirs = socket.socketpair()
        wire = Wire(mine, self.style)
        self.wires.append(wire)
        thread = threading.Thread(target=self._serve, args=(wire,), daemon=True)
        self.threads.append(thread)
        thread.start()
        return theirs

    def cut(self, index: int) -> None:
        """End one connection; what was parsed is done, the rest is not."""
        self.wires[index].close()

    def reboot(self) -> None:
        """Lose every connection and whatever was not flushed."""
        with self.lock:
            self.bytes[:] = self.durable
        for wire in self.wires:
            wire.close()
        for thread in self.threads:
            thread.join(10)
        with self.lock:  # what a connection had still parsed
            self.bytes[:] = self.durable
        self.wires.clear()

    def close(self) -> None:
        for wire in self.wires:
            wire.close()
        for thread in self.threads:
            thread.join(10)
        for wire in self.wires:
            wire.sock.close()
        assert not self.failures, self.failures

    def of(self, command: int) -> list[Asked]:
        """Requests of one kind so far."""
        return [one for one in self.asked if one.command == command]

    # ---- serving ----

    def _serve(self, wire: Wire) -> None:
        late: list[bytes] = []
        try:
            while True:
                asked = wire.request()
                self.asked.append(asked)
                if asked.command == w.CMD_DISC:
                    wire.close()
                    return
                answer = self.handler(self, wire, asked) if self.handler else None
                late += self.answer(wire, asked) if answer is None else answer
                if self.jumble is None or self.random.random() < 0.7 or not self._more(wire):
                    if self.jumble is not None:
                        late = self._mixed(late)
                    for piece in late:
                        wire.send(piece)
                    late = []
        except Gone:
            wire.close()
        except BaseException as failure:
            self.failures.append(failure)
            wire.close()

    @staticmethod
    def _more(wire: Wire) -> bool:
        """Whether another request is on its way: only then may an answer wait for it."""
        wire.sock.setblocking(False)
        try:
            return bool(wire.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            wire.sock.setblocking(True)

    def _mixed(self, pieces: list[bytes]) -> list[bytes]:
        """Shuffled, but what ends an answer stays behind the rest of it."""
        last = {piece[8:16]: piece for piece in pieces}
        rest = [piece for piece in pieces if last[piece[8:16]] is not piece]
        self.random.shuffle(rest)
        ends = list(last.values())
        self.random.shuffle(ends)
        return rest + ends

    def answer(self, wire: Wire, asked: Asked) -> list[bytes]:
        """Do the request; its answer as the pieces to send."""
        end = asked.offset + asked.length
        assert end <= self.size and not (asked.offset | asked.length) % self.block, asked
        if asked.command in (w.CMD_READ, w.CMD_WRITE):
            assert 0 < asked.length <= self.payload_max, asked
        with self.lock:
            match asked.command:
                case w.CMD_READ:
                    return self._content(wire, asked, bytes(self.bytes[asked.offset : end]))
                case w.CMD_WRITE:
                    self.bytes[asked.offset : end] = asked.payload
                case w.CMD_WRITE_ZEROES | w.CMD_TRIM:
                    self.bytes[asked.offset : end] = bytes(asked.length)
                case w.CMD_FLUSH:
                    self.durable = bytes(self.bytes)
                case w.CMD_BLOCK_STATUS:
                    return [wire.status(asked, self._extents(asked.offset, end))]
            if asked.flags & w.CMD_FLAG_FUA and asked.command in (w.CMD_WRITE, w.CMD_WRITE_ZEROES, w.CMD_TRIM):
                durable = bytearray(self.durable)
                durable[asked.offset : end] = self.bytes[asked.offset : end]
                self.durable = bytes(durable)
        return [wire.ok(asked)]

    def _content(self, wire: Wire, asked: Asked, data: bytes) -> list[bytes]:
        if self.style == "simple":
            return [wire.simple(asked, data)]
        if self.jumble is None:
            return [wire.data(asked, asked.offset, data, done=True)]
        cuts = sorted({0, len(data), *(self.random.randrange(len(data) + 1) for _ in range(self.random.randrange(6)))})
        pieces = [
            wire.data(asked, asked.offset + a, data[a:b])
            if any(data[a:b])
            else wire.hole(asked, asked.offset + a, b - a)
            for a, b in itertools.pairwise(cuts)
        ]
        self.random.shuffle(pieces)
        return [*pieces, wire.chunk(asked, w.CHUNK_NONE, done=True)]

    def _extents(self, offset: int, end: int) -> list[tuple[int, int]]:
        """Zero blocks of 4 KiB are holes."""
        found: list[tuple[int, int]] = []
        for at in range(offset, end, 4096):
            length = min(4096, end - at)
            state = 0 if any(self.bytes[at : at + length]) else 3
            if found and found[-1][1] == state:
                found[-1] = (found[-1][0] + length, state)
            else:
                found.append((length, state))
        return found
