"""The transmission phase of the raw NBD client, in the three header styles.

Every reply is checked for what the specification demands of it: magic, cookie, chunk order and types, DONE once,
data that covers the request exactly, error numbers from the wire's eight, readable messages.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.lib import nbdwords as w
from tests.lib.rawnbd import Address, Haggle, Haggled, Stream

Style = Literal["simple", "structured", "extended"]
STYLES: tuple[Style, ...] = ("simple", "structured", "extended")


class NbdError(Exception):
    """The server answered a request with an error."""

    def __init__(self, error: int, message: str = "") -> None:
        super().__init__(f"NBD error {error}: {message}")
        self.error = error


@dataclass(slots=True)
class Request:
    """What was asked, to judge the answer by."""

    command: int
    flags: int
    offset: int
    length: int


@dataclass(slots=True)
class Chunk:
    """One simple reply, or one structured or extended chunk."""

    cookie: int
    type: int
    flags: int
    payload: bytes
    error: int = 0
    message: str = ""

    @property
    def done(self) -> bool:
        """Whether it is the last of its reply."""
        return bool(self.flags & w.CHUNK_DONE)


@dataclass(slots=True)
class Answer:
    """A whole reply."""

    request: Request
    error: int = 0
    message: str = ""
    data: bytes = b""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Context id → (length, flags) in order."""
    chunks: list[Chunk] = field(default_factory=list)

    def check(self) -> Answer:
        """Raise NbdError when the reply is an error."""
        if self.error:
            raise NbdError(self.error, self.message)
        return self


class Transmission:
    """A connection in the transmission phase."""

    def __init__(self, stream: Stream, agreed: Haggled) -> None:
        self.stream = stream
        self.agreed = agreed
        self.size = agreed.facts.size
        self.flags = agreed.facts.flags
        self._cookies = itertools.count(0x1000)
        self._asked: dict[int, list[Request]] = {}
        self._parts: dict[int, list[Chunk]] = {}
        self._answers: dict[int, list[Answer]] = {}

    def __enter__(self) -> Transmission:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    # ---- sending ----

    def header(self, request: Request, cookie: int, *, payload: bool, magic: int | None = None) -> bytes:
        """A request header in the agreed style; `magic` may lie."""
        fields = (request.flags, request.command, cookie, request.offset, request.length)
        if self.agreed.extended:
            flags = request.flags | (w.CMD_FLAG_PAYLOAD_LEN if payload else 0)
            return struct.pack(">IHHQQQ", magic or w.EXTENDED_REQUEST_MAGIC, flags, *fields[1:])
        return struct.pack(">IHHQQI", magic or w.REQUEST_MAGIC, *fields)

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | memoryview | None = None,
        cookie: int | None = None,
    ) -> int:
        """Send a request without waiting; return its cookie. A payload sets PAYLOAD_LEN in the extended style."""
        number = next(self._cookies) if cookie is None else cookie
        request = Request(command, flags, offset, length)
        head = self.header(request, number, payload=payload is not None)
        if command == w.CMD_BLOCK_STATUS and payload is not None and len(payload) >= 8:
            (effect,) = struct.unpack_from(">Q", payload)  # the answer is judged by the length that the payload names
            request = Request(command, flags, offset, effect)
        self._asked.setdefault(number, []).append(request)
        if payload is not None and len(payload) > 65536:
            self.stream.send(head)
            self.stream.send(payload)
        else:
            self.stream.send(head + (bytes(payload) if payload is not None else b""))
        return number

    # ---- receiving ----

    def chunk(self) -> Chunk:
        """Receive one simple reply or chunk."""
        chunk = self._simple() if not self.agreed.structured else self._structured()
        assert chunk.error == 0 or chunk.error in w.WIRE_ERRORS, f"error {chunk.error} is none of the wire's"
        return chunk

    def _simple(self) -> Chunk:
        magic, error, cookie = struct.unpack(">IIQ", self.stream.recv(16))
        assert magic == w.SIMPLE_REPLY_MAGIC, hex(magic)
        request = self._request(cookie)
        data = self.stream.recv(request.length) if request.command == w.CMD_READ and not error else b""
        return Chunk(cookie, w.CHUNK_OFFSET_DATA, w.CHUNK_DONE, data, error)

    def _structured(self) -> Chunk:
        if self.agreed.extended:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.stream.recv(32))
            assert magic == w.EXTENDED_REPLY_MAGIC, hex(magic)
            assert offset == self._request(cookie).offset, "an extended reply repeats the request's offset"
        else:
            start = self.stream.recv(16)
            if struct.unpack_from(">I", start) == (w.SIMPLE_REPLY_MAGIC,):
                return self._simple_among_structured(start)
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", start + self.stream.recv(4))
            assert magic == w.STRUCTURED_REPLY_MAGIC, hex(magic)
            self._request(cookie)
        assert flags & ~w.CHUNK_DONE == 0, f"chunk flags {flags:#x}"
        assert length <= w.PAYLOAD_MAX + 64, f"chunk of {length} bytes"
        chunk = Chunk(cookie, kind, flags, self.stream.recv(length))
        if kind in (w.CHUNK_ERROR, w.CHUNK_ERROR_OFFSET):
            chunk.error, size = struct.unpack_from(">IH", chunk.payload)
            chunk.message = chunk.payload[6 : 6 + size].decode()
            assert chunk.error != 0
            assert length == 6 + size + (8 if kind == w.CHUNK_ERROR_OFFSET else 0)
        return chunk

    def _simple_among_structured(self, reply: bytes) -> Chunk:
        """A server may answer anything but READ and BLOCK_STATUS simply, whatever was negotiated."""
        _, error, cookie = struct.unpack(">IIQ", reply)
        command = self._request(cookie).command
        assert command not in (w.CMD_READ, w.CMD_BLOCK_STATUS), f"a simple reply to command {command}"
        return Chunk(cookie, w.CHUNK_NONE, w.CHUNK_DONE, b"", error)

    def _request(self, cookie: int) -> Request:
        assert self._asked.get(cookie), f"a reply to cookie {cookie:#x}, which nobody sent"
        return self._asked[cookie][0]

    def wait(self, cookie: int) -> Answer:
        """Receive until the request with this cookie is answered; others' answers are kept for their own wait."""
        while not self._answers.get(cookie):
            self.take()
        return self._answers[cookie].pop(0)

    def take(self) -> Answer | None:
        """Receive one chunk; return the answer that it completed, if it did (it is also kept for `wait`)."""
        chunk = self.chunk()
        parts = self._parts.setdefault(chunk.cookie, [])
        parts.append(chunk)
        if not chunk.done:
            return None
        request = self._asked[chunk.cookie].pop(0)
        answer = self._assemble(request, self._parts.pop(chunk.cookie))
        self._answers.setdefault(chunk.cookie, []).append(answer)
        return answer

    def wait_any(self) -> tuple[int, Answer]:
        """Receive until some request is answered; return its cookie and answer."""
        while True:
            for cookie, answers in self._answers.items():
                if answers:
                    answer = answers.pop(0)
                    if not answers:
                        del self._answers[cookie]
                    return cookie, answer
            self.take()

    def _assemble(self, request: Request, chunks: list[Chunk]) -> Answer:
        answer = Answer(request, chunks=chunks)
        for chunk in chunks:
            if chunk.error:
                assert not answer.error, "two errors in one reply"
                answer.error, answer.message = chunk.error, chunk.message
        if not self.agreed.structured:
            answer.data = chunks[0].payload
        elif request.command == w.CMD_READ:
            answer.data = self._read_data(request, chunks, failed=bool(answer.error))
        elif request.command == w.CMD_BLOCK_STATUS:
            answer.extents = self._extents(request, chunks, failed=bool(answer.error))
        else:
            assert len(chunks) == 1, f"{len(chunks)} chunks for command {request.command}"
            assert answer.error or (chunks[0].type == w.CHUNK_NONE and not chunks[0].payload)
        return answer

    def _read_data(self, request: Request, chunks: list[Chunk], *, failed: bool) -> bytes:
        if failed and all(chunk.error for chunk in chunks):
            return b""  # the length asked for may have been absurd
        data = bytearray(request.length)
        covered: list[tuple[int, int]] = []
        for chunk in chunks:
            if chunk.type == w.CHUNK_OFFSET_DATA:
                (offset,) = struct.unpack_from(">Q", chunk.payload)
                body: bytes | memoryview = memoryview(chunk.payload)[8:]
            elif chunk.type == w.CHUNK_OFFSET_HOLE:
                offset, size = struct.unpack(">QI", chunk.payload)
                body = bytes(size)
            else:
                assert chunk.error or chunk.type == w.CHUNK_NONE, f"chunk type {chunk.type} in a read"
                continue
            assert len(body) > 0, "an empty content chunk"
            start = offset - request.offset
            assert 0 <= start <= start + len(body) <= request.length, "a content chunk outside the request"
            data[start : start + len(body)] = body
            covered.append((start, start + len(body)))
        if request.flags & w.CMD_FLAG_DF:
            assert len(covered) <= 1, "DF: more than one content chunk"
        covered.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(covered)), "content chunks overlap"
        if not failed:
            assert sum(end - start for start, end in covered) == request.length, "content chunks leave a gap"
        return bytes(data)

    def _extents(self, request: Request, chunks: list[Chunk], *, failed: bool) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for chunk in chunks:
            if chunk.error:
                continue
            if chunk.type == w.CHUNK_BLOCK_STATUS_EXT:
                assert self.agreed.extended
                context, count = struct.unpack_from(">II", chunk.payload)
                body, form = chunk.payload[8:], ">QQ"
                assert len(body) == 16 * count
            else:
                assert chunk.type == w.CHUNK_BLOCK_STATUS, f"chunk type {chunk.type} in a status"
                assert not self.agreed.extended, "extended headers want BLOCK_STATUS_EXT"
                (context,) = struct.unpack_from(">I", chunk.payload)
                body, form = chunk.payload[4:], ">II"
            assert context not in found, "one chunk per context"
            found[context] = [(int(a), int(b)) for a, b in struct.iter_unpack(form, body)]
            self._check_extents(request, found[context])
        if not failed:
            assert found, "a status without extents"
        return found

    def _check_extents(self, request: Request, extents: list[tuple[int, int]]) -> None:
        assert extents and all(length > 0 for length, _ in extents)
        assert all(a[1] != b[1] for a, b in itertools.pairwise(extents)), "equal neighbours are to be merged"
        assert sum(length for length, _ in extents[:-1]) < request.length
        assert request.offset + sum(length for length, _ in extents) <= self.size, "status beyond the export"
        if request.flags & w.CMD_FLAG_REQ_ONE:
            assert len(extents) == 1 and extents[0][0] <= request.length, "REQ_ONE: one extent, not longer than asked"

    # ---- whole calls ----

    def call(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes | None = None
    ) -> Answer:
        """Send a request and wait for its answer, good or bad."""
        return self.wait(self.send(command, offset, length, flags=flags, payload=payload))

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """READ. Raises NbdError."""
        return self.call(w.CMD_READ, offset, length, flags=flags).check().data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """WRITE. Raises NbdError."""
        self.call(w.CMD_WRITE, offset, len(data), flags=flags, payload=data).check()

    def flush(self) -> None:
        """FLUSH. Raises NbdError."""
        self.call(w.CMD_FLUSH).check()

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """TRIM. Raises NbdError."""
        self.call(w.CMD_TRIM, offset, length, flags=flags).check()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """WRITE_ZEROES. Raises NbdError."""
        self.call(w.CMD_WRITE_ZEROES, offset, length, flags=flags).check()

    def status(self, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
        """BLOCK_STATUS of base:allocation. Raises NbdError."""
        context = self.agreed.contexts["base:allocation"]
        return self.call(w.CMD_BLOCK_STATUS, offset, length, flags=flags).check().extents[context]

    def disconnect(self) -> None:
        """DISC; the server must close without a reply."""
        self.send(w.CMD_DISC)
        assert self.stream.wait_closed() == b"", "DISC has no reply"


def open_export(
    address: Address, name: str, style: Style = "structured", contexts: Sequence[str] = ("base:allocation",)
) -> Transmission:
    """Connect and enter an export by GO, as a well-behaved client. Raises OptionRefused or Closed."""
    haggle = Haggle(address)
    try:
        return enter(haggle.begin(), name, style, contexts)
    except BaseException:
        haggle.stream.close()
        raise


def enter(
    haggle: Haggle, name: str, style: Style = "structured", contexts: Sequence[str] = ("base:allocation",)
) -> Transmission:
    """GO on a connection whose greeting (and STARTTLS, if any) is done."""
    if style == "extended":
        haggle.extended()
    elif style == "structured":
        haggle.structured()
    if style != "simple" and contexts:
        haggle.meta(w.OPT_SET_META_CONTEXT, name, contexts)
    haggle.facts(w.OPT_GO, name, (w.INFO_BLOCK_SIZE, w.INFO_DESCRIPTION))
    return Transmission(haggle.stream, haggle.agreed)
