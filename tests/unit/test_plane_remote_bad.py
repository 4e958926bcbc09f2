"""Servers that break the protocol: the link is lost with a sentence that says why, and nothing else happens.

Each case is one wrong answer, on a link that is then replaced by an honest one: the client above gets the right bytes,
and its neighbour on another volume never notices.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from tests.lib import nbdwords as w
from tests.lib.fakeserver import CONTEXT, Asked, FakeServer, Wire
from tests.lib.rawio import STYLES, Style
from tests.unit.plane_rig import Rig, eventually, rig
from tests.unit.remote_rig import Remote
from tests.unit.test_plane_remote import served, servers

__all__ = ["rig", "servers"]
Answer = Callable[[Wire, Asked], bytes]
OTHER = Asked(w.CMD_READ, 0, 0xDEAD << 32, 0, 4096)
"""A request that was never sent."""


def meets(
    rig: Rig, servers: list[FakeServer], style: Style, command: int, answer: Answer, says: str, length: int = 4096
) -> None:
    """One bad answer to a request: its link ends with EPROTO and this reason; the request succeeds elsewhere."""
    wrong = [answer]

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wrong.pop()(wire, asked)] if wrong and asked.command == command else None

    server = served(servers, style=style, handler=handler)
    server.bytes[:length] = b"right!!!" * (length // 8)
    neighbour = rig.connect(rig.volume())
    remote = Remote(rig, server)
    client = rig.connect(remote.volume(), style="simple" if command != w.CMD_BLOCK_STATUS else "structured")
    payload = b"right!!!" * (length // 8) if command == w.CMD_WRITE else None
    cookie = client.send(command, 0, 0 if command == w.CMD_FLUSH else length, payload=payload)
    end = remote.ends[0].result(10)
    assert (end.errno, says in end.reason) == (errno.EPROTO, True), end
    remote.link()
    reply = client.wait(cookie)
    assert reply.error == 0, reply
    if command == w.CMD_READ:
        assert reply.data == b"right!!!" * (length // 8)
    neighbour.write(0, b"x" * 512)
    assert neighbour.read(0, 512) == b"x" * 512
    assert remote.stats.lost == 1 and remote.stats.links == 1


@pytest.mark.parametrize("style", STYLES)
def test_s1_garbage_instead_of_an_answer(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    meets(rig, servers, style, w.CMD_READ, lambda wire, asked: b"HTTP/1.1 400 Bad Request\r\n" * 3, "0x48545450")


@pytest.mark.parametrize("style", STYLES)
def test_s2_an_answer_to_nothing(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    """An unknown cookie; and one that was right until its answer had come."""

    def unknown(wire: Wire, asked: Asked) -> bytes:
        return wire.ok(OTHER) if style != "structured" else wire.chunk(OTHER, w.CHUNK_NONE, done=True)

    meets(rig, servers, style, w.CMD_READ, unknown, "does not wait for it")


@pytest.mark.parametrize("style", STYLES)
def test_s2_two_answers_to_one_request(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    def twice(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [*server.answer(wire, asked), *server.answer(wire, asked)] if asked.command == w.CMD_READ else None

    server = served(servers, style=style, handler=twice)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    assert client.read(0, 512) == bytes(512)
    end = remote.ends[0].result(10)
    assert end.errno == errno.EPROTO and "does not wait for it" in end.reason


@pytest.mark.parametrize("style", STYLES)
def test_s3_words_without_being_asked(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    server = served(servers, style=style)
    remote = Remote(rig, server)
    eventually("serving", lambda: remote.stats.links == 1)
    server.wires[0].send(server.wires[0].ok(OTHER))
    assert remote.ends[0].result(10).errno == errno.EPROTO


@pytest.mark.parametrize(
    ("style", "sent"),
    [
        ("simple", lambda wire, asked: Wire(wire.sock, "structured").data(asked, 0, b"x" * 4096, done=True)),
        ("structured", lambda wire, asked: Wire(wire.sock, "extended").data(asked, 0, b"x" * 4096, done=True)),
        ("simple", lambda wire, asked: Wire(wire.sock, "extended").data(asked, 0, b"x" * 4096, done=True)),
        ("extended", lambda wire, asked: Wire(wire.sock, "structured").data(asked, 0, b"x" * 4096, done=True)),
        ("extended", lambda wire, asked: wire.simple(asked, b"x" * 4096)),
        ("structured", lambda wire, asked: wire.simple(asked, b"x" * 4096)),
    ],
)
def test_s4_replies_that_were_not_agreed(rig: Rig, servers: list[FakeServer], style: Style, sent: Answer) -> None:
    meets(rig, servers, style, w.CMD_READ, sent, "agreed")


READS: dict[str, tuple[Answer, str]] = {
    "before": (lambda wire, asked: wire.data(asked, 0, b"x" * 512), "for a read of"),
    "behind": (lambda wire, asked: wire.data(asked, 8192, b"x" * 512), "for a read of"),
    "too long": (lambda wire, asked: wire.data(asked, 4096, b"x" * 4097), "for a read of"),
    "around the corner": (lambda wire, asked: wire.data(asked, 2**64 - 512, b"x" * 1024), "for a read of"),
    "hole behind": (lambda wire, asked: wire.hole(asked, 4096, 2**32 - 1), "for a read of"),
    "empty hole": (lambda wire, asked: wire.hole(asked, 4096, 0), "for a read of"),
    "empty data": (lambda wire, asked: wire.data(asked, 4096, b""), "chunk of type 1"),
    "twice": (lambda wire, asked: wire.data(asked, 4096, b"x" * 100) + wire.data(asked, 4195, b"y"), "twice"),
    "hole over data": (lambda wire, asked: wire.data(asked, 5000, b"x" * 9) + wire.hole(asked, 4096, 4096), "twice"),
    "short": (lambda wire, asked: wire.data(asked, 4096, b"x" * 4095, done=True), "4095 of the 4096"),
    "nothing": (lambda wire, asked: wire.chunk(asked, w.CHUNK_NONE, done=True), "0 of the 4096"),
}


@pytest.mark.parametrize("style", ["structured", "extended"])
@pytest.mark.parametrize("case", READS)
def test_s5_content_that_does_not_fit(rig: Rig, servers: list[FakeServer], style: Style, case: str) -> None:
    answer, says = READS[case]
    wrong = [answer]

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wrong.pop()(wire, asked)] if wrong and asked.offset == 4096 else None

    server = served(servers, style=style, handler=handler)
    server.bytes[4096:8192] = b"z" * 4096
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_READ, 4096, 4096)
    end = remote.ends[0].result(10)
    assert end.errno == errno.EPROTO and says in end.reason, end
    remote.link()
    assert client.wait(cookie).check().data == b"z" * 4096


@pytest.mark.parametrize("style", ["structured", "extended"])
def test_s6_an_answer_in_very_many_pieces(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    """Every other byte first: refused. In order, one byte each: served."""
    scatter = [True]

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command != w.CMD_READ:
            return None
        step = 2 if scatter else 1
        scatter.clear()
        pieces = [wire.data(asked, at, b"p") for at in range(0, 4096, step)]
        return [b"".join(pieces), wire.chunk(asked, w.CHUNK_NONE, done=True)]

    remote = Remote(rig, served(servers, style=style, handler=handler))
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_READ, 0, 4096)
    assert "scattered" in remote.ends[0].result(10).reason
    remote.link()
    assert client.wait(cookie).check().data == b"p" * 4096


@pytest.mark.parametrize("style", ["structured", "extended"])
@pytest.mark.parametrize("command", [w.CMD_WRITE, w.CMD_WRITE_ZEROES, w.CMD_BLOCK_STATUS])
def test_s7_content_for_what_is_no_read(rig: Rig, servers: list[FakeServer], style: Style, command: int) -> None:
    meets(
        rig, servers, style, command, lambda wire, asked: wire.data(asked, 0, b"x" * 512, done=True),
        "content for command",
    )  # fmt: skip


def test_s7_content_for_a_flush(rig: Rig, servers: list[FakeServer]) -> None:
    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wire.data(asked, 0, b"x" * 512, done=True)] if asked.command == w.CMD_FLUSH else None

    remote = Remote(rig, served(servers, handler=handler))
    client = rig.connect(remote.volume())
    client.write(0, b"x" * 512)
    cookie = client.send(w.CMD_FLUSH)
    assert "content for command" in remote.ends[0].result(10).reason
    assert client.wait(cookie).error == 5, "what was acknowledged is owed by a server that is gone"


def ids(context: int, *words: int, wide: bool = False) -> bytes:
    return struct.pack(">I", context) + struct.pack(f">{len(words)}{'Q' if wide else 'I'}", *words)


STATUS: dict[str, tuple[Style, Answer, str]] = {
    "unasked": ("structured", lambda wire, asked: wire.status(asked, [(4096, 0)]), "not asked for"),
    "other context": ("structured", lambda wire, asked: wire.status(asked, [(4096, 0)], context=1), "of context 1"),
    "empty": ("structured", lambda wire, asked: wire.chunk(asked, w.CHUNK_BLOCK_STATUS, ids(CONTEXT)), "type 5"),
    "half": (
        "structured",
        lambda wire, asked: wire.chunk(asked, w.CHUNK_BLOCK_STATUS, ids(CONTEXT, 4096, 0, 1)),
        "status of 16 bytes",
    ),
    "no length": ("structured", lambda wire, asked: wire.status(asked, [(0, 0), (4096, 0)]), "0 bytes"),
    "too much": ("structured", lambda wire, asked: wire.status(asked, [(4096, 0), (4096, 3)]), "more than was asked"),
    "silence": ("structured", lambda wire, asked: wire.chunk(asked, w.CHUNK_NONE, done=True), "nothing about"),
    "simple success": ("structured", lambda wire, asked: wire.simple(asked), "simple reply to command 7"),
    "narrow": (
        "extended",
        lambda wire, asked: wire.chunk(asked, w.CHUNK_BLOCK_STATUS, ids(CONTEXT, 4096, 0), done=True),
        "not asked for",
    ),
    "lying count": (
        "extended",
        lambda wire, asked: wire.chunk(
            asked, w.CHUNK_BLOCK_STATUS_EXT, struct.pack(">IIQQ", CONTEXT, 2, 4096, 0), done=True
        ),
        "status of 24 bytes",
    ),
    "twice": (
        "structured",
        lambda wire, asked: wire.chunk(asked, w.CHUNK_BLOCK_STATUS, ids(CONTEXT, 4096, 0)) * 2,
        "not asked for",
    ),
}


@pytest.mark.parametrize("case", STATUS)
def test_s8_block_status_that_makes_no_sense(rig: Rig, servers: list[FakeServer], case: str) -> None:
    style, answer, says = STATUS[case]
    command = w.CMD_READ if case == "unasked" else w.CMD_BLOCK_STATUS
    meets(rig, servers, style, command, answer, says)


CHUNKS: dict[str, tuple[Answer, str]] = {
    "unknown type": (lambda wire, asked: wire.chunk(asked, 4, b"", done=True), "chunk of type 4"),
    "NONE with bytes": (lambda wire, asked: wire.chunk(asked, w.CHUNK_NONE, b"x", done=True), "type 0 with 1"),
    "NONE not done": (lambda wire, asked: wire.chunk(asked, w.CHUNK_NONE), "type 0 with 0"),
    "short hole": (lambda wire, asked: wire.chunk(asked, w.CHUNK_OFFSET_HOLE, b"x" * 11), "type 2 with 11"),
    "error 0": (
        lambda wire, asked: wire.chunk(asked, w.CHUNK_ERROR, struct.pack(">IH", 0, 0), done=True),
        "malformed error",
    ),
    "error text": (
        lambda wire, asked: wire.chunk(asked, w.CHUNK_ERROR, struct.pack(">IH", 5, 9) + b"short", done=True),
        "malformed error",
    ),
    "error too short": (lambda wire, asked: wire.chunk(asked, w.CHUNK_ERROR, b"\0" * 5, done=True), "with 5 bytes"),
    "endless error": (
        lambda wire, asked: wire.chunk(asked, w.CHUNK_ERROR, struct.pack(">IH", 5, 0) + b"x" * 5000, done=True),
        "with 5006 bytes",
    ),
    "4 GiB of data": (
        lambda wire, asked: struct.pack(">IHHQI", w.STRUCTURED_REPLY_MAGIC, 1, 1, asked.cookie, 2**32 - 1) + b"x" * 64,
        "for a read of",
    ),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_s9_malformed_chunks(rig: Rig, servers: list[FakeServer], case: str) -> None:
    answer, says = CHUNKS[case]
    meets(rig, servers, "structured", w.CMD_READ, answer, says)


def test_s10_an_extended_reply_for_another_place(rig: Rig, servers: list[FakeServer]) -> None:
    def elsewhere(wire: Wire, asked: Asked) -> bytes:
        moved = Asked(asked.command, 0, asked.cookie, 12345, asked.length)
        return wire.data(moved, 0, b"x" * 4096, done=True)

    meets(rig, servers, "extended", w.CMD_READ, elsewhere, "names offset 12345")


@pytest.mark.parametrize("style", STYLES)
def test_s11_an_end_in_the_middle_of_an_answer(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    cuts = [1, 15, 20, 40, 3000]

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command != w.CMD_READ or not cuts:
            return None
        wire.send(b"".join(server.answer(wire, asked))[: cuts.pop(0)])
        wire.close()
        return []

    server = served(servers, style=style, handler=handler)
    server.bytes[:4096] = b"q" * 4096
    remote = Remote(rig, server)
    client = rig.connect(remote.volume())
    cookie = client.send(w.CMD_READ, 0, 4096)
    for _ in range(5):
        assert remote.ends[-1].result(10).errno == errno.ECONNRESET
        remote.link()
    assert client.wait(cookie).check().data == b"q" * 4096


@pytest.mark.parametrize("error", [1, 22, 28, 75, 95, 77, 2**31, 2**32 - 1])
@pytest.mark.parametrize("style", STYLES)
def test_s12_any_error_number_is_an_error(rig: Rig, servers: list[FakeServer], style: Style, error: int) -> None:
    """Known ones that are about the request are passed on; others become EIO; none is taken for success."""

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wire.error(asked, error, "x" * 100)]

    remote = Remote(rig, served(servers, style=style, handler=handler))
    client = rig.connect(remote.volume())
    expected = error if error in (1, 28) else 5
    assert client.wait(client.send(w.CMD_READ, 0, 512)).error == expected
    assert client.wait(client.send(w.CMD_WRITE, 0, 512, payload=b"x" * 512)).error == expected
    assert remote.stats.lost == 0


@pytest.mark.parametrize("style", ["structured", "extended"])
def test_s13_an_error_behind_content_counts(rig: Rig, servers: list[FakeServer], style: Style) -> None:
    """All bytes have come, then an error for some of them; unknown kinds of errors too."""
    kinds = [w.CHUNK_ERROR, w.CHUNK_ERROR + 1, 0x8123]

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        body = struct.pack(">IH", 5, 3) + b"bad" + struct.pack(">Q", 100)
        kind = kinds.pop(0)
        if kind == w.CHUNK_ERROR:
            body = body[:9]
        return [wire.data(asked, 0, b"x" * 512), wire.chunk(asked, kind, body), wire.chunk(asked, 0, done=True)]

    remote = Remote(rig, served(servers, style=style, handler=handler))
    client = rig.connect(remote.volume())
    for _ in range(3):
        assert client.wait(client.send(w.CMD_READ, 0, 512)).error == 5
    assert remote.stats.lost == 0 and remote.stats.errors == 3


def test_s14_zeroes_that_are_refused_are_written(rig: Rig, servers: list[FakeServer]) -> None:
    """ENOTSUP without FAST_ZERO is against the protocol, and would leave old bytes."""

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        return [wire.error(asked, 95)] if asked.command == w.CMD_WRITE_ZEROES else None

    server = served(servers, handler=handler)
    server.bytes[:8192] = b"o" * 8192
    client = rig.connect(Remote(rig, server).volume())
    client.zero(0, 4096)
    assert server.bytes[:8192] == bytes(4096) + b"o" * 4096
    assert client.wait(client.send(w.CMD_WRITE_ZEROES, 0, 4096, flags=w.CMD_FLAG_FAST_ZERO)).error == 95


def test_s15_a_server_that_answers_before_it_has_everything(rig: Rig, servers: list[FakeServer]) -> None:
    """Success for a write whose bytes are still on their way: the buffer is not given back before they have left."""

    def serve_early(wire: Wire) -> None:
        head = wire.recv(28)
        magic, _, command, cookie, _offset, length = struct.unpack(">IHHQQI", head)
        assert magic == w.REQUEST_MAGIC and command == w.CMD_WRITE
        wire.send(struct.pack(">IIQ", w.SIMPLE_REPLY_MAGIC, 0, cookie))
        taken.append(wire.recv(length))

    taken: list[bytes] = []

    def handler(server: FakeServer, wire: Wire, asked: Asked) -> list[bytes] | None:
        if asked.command == w.CMD_READ:
            serve_early(wire)
        return None

    server = served(servers, size=8 << 20, style="simple", handler=handler)
    remote = Remote(rig, server)
    client = rig.connect(remote.volume(), 8 << 20)
    first = client.send(w.CMD_READ, 0, 512)
    second = client.send(w.CMD_WRITE, 0, 2 << 20, payload=b"early" * ((2 << 20) // 5) + b"!!")
    client.wait(second).check()
    client.wait(first).check()
    assert taken == [b"early" * ((2 << 20) // 5) + b"!!"]
