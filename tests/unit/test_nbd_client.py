"""The client's side of the haggling, byte for byte, and NBD URIs."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.uri import NbdUri, parse_uri
from nbdvvol.nbd.client import ExportInfo, StartTls, Wants, haggle
from nbdvvol.nbd.constants import TransmissionFlag

HELLO = b"NBDMAGICIHAVEOPT\x00\x03"
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH


def reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(body)) + body


def granted(option: int, *, sizes: bytes = struct.pack(">HIII", 3, 1, 4096, 1 << 25)) -> bytes:
    export = struct.pack(">HQH", 0, 1 << 30, FLAGS)
    more = reply(option, 3, sizes) if sizes else b""
    return reply(option, 3, export) + reply(option, 3, b"\x00\x01name") + more + reply(option, 1)


def talk(
    server: bytes, name: str = "root", *, enter: bool = True, wants: Wants | None = None
) -> tuple[bytes, ExportInfo, bytes]:
    """Run a haggle against canned bytes; return what it sent, what it found, and what it left unread."""
    sent, machine = b"", haggle(name, enter=enter, wants=wants)
    step = next(machine)
    while True:
        try:
            if isinstance(step, StartTls):
                sent += b"<TLS>"
                step = machine.send(b"")
            elif isinstance(step, bytes):
                sent += step
                step = machine.send(b"")
            else:
                assert len(server) >= step, f"it wants {step} bytes, the server has sent {server!r}"
                given_bytes, server = server[:step], server[step:]
                step = machine.send(given_bytes)
        except StopIteration as done:
            return sent, done.value, server


def test_go_says_what_the_protocol_wants_and_reads_nothing_beyond() -> None:
    sent, info, rest = talk(HELLO + granted(7) + b"reply to the kernel")
    assert sent == (
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c"  # client flags, GO, length
        b"\0\0\0\x04root\0\x01\0\x03"  # name, one info request: BLOCK_SIZE
    )
    assert info == ExportInfo(1 << 30, FLAGS, 1, 4096, 1 << 25)
    assert rest == b"reply to the kernel"


def test_info_ends_with_abort() -> None:
    sent, info, rest = talk(HELLO + granted(6), enter=False)
    assert sent.endswith(b"IHAVEOPT\0\0\0\x02\0\0\0\0")
    assert (info.size, rest) == (1 << 30, b"")


def test_only_offered_flags_are_echoed() -> None:
    sent, _, _ = talk(HELLO[:-1] + b"\x01" + granted(7))
    assert sent[:4] == b"\0\0\0\x01"


def test_a_server_without_block_sizes_has_the_protocols_defaults() -> None:
    _, info, _ = talk(HELLO + granted(7, sizes=b""))
    assert (info.block_min, info.block_preferred, info.payload_max) == (1, 4096, 32 << 20)


@pytest.mark.parametrize(
    ("number", "code"),
    [(6, Code.NOT_FOUND), (2, Code.DENIED), (7, Code.UNAVAILABLE), (5, Code.UNSUPPORTED), (1, Code.UNSUPPORTED),
     (3, Code.INVALID), (99, Code.INVALID)],
)  # fmt: skip
def test_a_refusal_has_a_code_and_the_servers_words(number: int, code: Code) -> None:
    with pytest.raises(NvError, match=r"'root'.*ask somebody else") as refused:
        talk(HELLO + reply(7, (1 << 31) + number, b"ask somebody else"))
    assert refused.value.code is code


@pytest.mark.parametrize(
    "server",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0",  # oldstyle
        HELLO[:-1] + b"\x02",  # not fixed newstyle
        HELLO + reply(6, 1),  # an answer to another option
        HELLO + b"\0" * 20,
        HELLO + reply(7, 1),  # no size
        HELLO + reply(7, 3, b"\0\0\0") + reply(7, 1),
        HELLO + granted(7, sizes=struct.pack(">HIII", 3, 3, 4096, 1 << 25)),
        HELLO + granted(7, sizes=struct.pack(">HIII", 3, 0, 4096, 1 << 25)),
        HELLO + granted(7, sizes=struct.pack(">HII", 3, 1, 4096)),
        HELLO + struct.pack(">QIII", 0x0003E889045565A9, 7, 3, 1 << 30),
        HELLO + reply(7, 3, b"\0\x02x") * 100,
    ],
)
def test_a_peer_that_does_not_speak_it_is_refused(server: bytes) -> None:
    with pytest.raises(NvError) as refused:
        talk(server)
    assert refused.value.code in (Code.INVALID, Code.UNSUPPORTED)


@given(st.binary(max_size=200))
def test_no_bytes_of_a_server_break_it(server: bytes) -> None:
    try:
        talk(HELLO + server + bytes(70000))
    except (NvError, AssertionError):
        pass


ACK, UNSUP, CONTEXT = 1, (1 << 31) + 1, 4
ALL = Wants(structured=True)
BASE = b"base:allocation"


def test_the_best_that_the_server_has_is_agreed() -> None:
    """Extended headers; without them structured replies; base:allocation with either."""
    context = reply(10, CONTEXT, b"\0\0\0\x07" + BASE) + reply(10, ACK)
    _, info, rest = talk(HELLO + reply(11, ACK) + context + granted(7), wants=ALL)
    assert (info.extended, info.structured, info.allocation, rest) == (True, False, 7, b"")
    sent, info, _ = talk(HELLO + reply(11, UNSUP, b"no") + reply(8, ACK) + context + granted(7), wants=ALL)
    assert (info.extended, info.structured, info.allocation) == (False, True, 7)
    assert sent.count(b"IHAVEOPT") == 4 and sent.startswith(b"\0\0\0\x03IHAVEOPT\0\0\0\x0b")


def test_a_server_with_nothing_is_fine() -> None:
    _, info, _ = talk(HELLO + reply(11, UNSUP) + reply(8, UNSUP) + granted(7), wants=ALL)
    assert (info.extended, info.structured, info.allocation) == (False, False, None)
    _, info, _ = talk(HELLO + reply(11, UNSUP) + reply(8, ACK) + reply(10, UNSUP) + granted(7), wants=ALL)
    assert (info.structured, info.allocation) == (True, None)
    _, info, _ = talk(HELLO + reply(11, UNSUP) + reply(8, ACK) + reply(10, ACK) + granted(7), wants=ALL)
    assert (info.structured, info.allocation) == (True, None)


def test_meta_contexts_that_nobody_asked_for_are_refused() -> None:
    other = reply(10, CONTEXT, b"\0\0\0\x01qemu:dirty-bitmap:x")
    with pytest.raises(NvError, match="was not asked for"):
        talk(HELLO + reply(11, ACK) + other, wants=ALL)
    with pytest.raises(NvError, match="more than 64 replies"):
        talk(HELLO + reply(11, ACK) + reply(10, CONTEXT, b"\0\0\0\x01" + BASE) * 65, wants=ALL)


def test_everything_but_starttls_goes_through_tls() -> None:
    sent, info, _ = talk(HELLO + reply(5, ACK) + reply(11, ACK) + reply(10, ACK) + granted(7), wants=Wants(True, True))
    before, after = sent.split(b"<TLS>")
    assert before == b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0"
    assert after.startswith(b"IHAVEOPT\0\0\0\x0b") and info.extended


def test_without_tls_nothing_is_told() -> None:
    """Not even the export's name goes over the wire in the clear."""
    machine = haggle("secret", enter=True, wants=Wants(tls=True))
    assert next(machine) == 18
    assert b"secret" not in bytes(machine.send(HELLO))  # type: ignore[arg-type]
    with pytest.raises(NvError, match="does not start TLS") as refused:
        talk(HELLO + reply(5, UNSUP, b"what?"), wants=Wants(tls=True))
    assert refused.value.code is Code.UNSUPPORTED and "what?" in refused.value.message


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("nbd://h", NbdUri("", host="h")),
        ("nbd://h/vm1/root", NbdUri("vm1/root", host="h")),
        ("nbd://[::1]:9/a%20b", NbdUri("a b", host="::1", port=9)),
        ("nbds://h:10809/x", NbdUri("x", host="h", tls=True)),
        ("nbds://h/x?tls-type=psk&tls-psk-file=/k", NbdUri("x", host="h", tls=True)),
        ("nbd+unix:///root?socket=/run/a%20b.sock", NbdUri("root", socket="/run/a b.sock")),
        ("nbd+unix:////abs?socket=s", NbdUri("/abs", socket="s")),
    ],
)
def test_uris_are_read_and_written(text: str, parsed: NbdUri) -> None:
    assert parse_uri(text) == parsed
    assert parse_uri(str(parsed)) == parsed


@given(st.text(max_size=40).filter(lambda text: "\0" not in text), st.sampled_from(["/run/s", "/a b/ü?&#%.sock"]))
def test_every_name_survives_a_uri(name: str, socket: str) -> None:
    uri = NbdUri(name, socket=socket)
    assert parse_uri(str(uri)) == uri
    assert parse_uri(str(NbdUri(name, host="10.0.0.1", port=1))).name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("root", "scheme ''"),
        ("http://h/x", "scheme 'http'"),
        ("nbd+unix:///x", "socket=PATH"),
        ("nbd:///x", "needs a host"),
        ("nbd://h/x?socket=s", "takes no socket"),
        ("nbd://h/x?sockets=s", "parameter 'sockets'"),
        ("nbd://h:99999/x", "port"),
        ("nbd://h/" + "x" * 4097, "4097 bytes, the limit is 4096"),
        ("nbd://h/%ff", "utf-8"),
        ("nbd://h/\udcff", "utf-8"),
    ],
)
def test_wrong_uris_say_which_part(text: str, said: str) -> None:
    with pytest.raises(NvError) as refused:
        parse_uri(text)
    assert said.lower() in refused.value.message.lower()
