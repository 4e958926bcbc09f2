"""The client's side of the haggling: fixed newstyle, INFO or GO, and what else is wanted and to be had.

Sans I/O: `haggle` is a generator that yields bytes to send, the exact number of bytes it must be given next, or
`StartTls` where the bytes from here on go through TLS. It never asks for a byte beyond the last answer, so that
after GO the socket can go to the kernel's driver or to the data plane as it is. The kernel's driver has no TLS,
no structured replies and no meta contexts: it wants nothing. The data plane takes the best that the server has.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass, replace

from nbdvvol.model.errors import Code, NvError
from nbdvvol.nbd.claims import EPOCH_CONTEXT, Claim
from nbdvvol.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_PREFERRED_BYTES,
    IHAVEOPT,
    INIT_PASSWD,
    OPTION_BYTES_MAX,
    OPTION_REPLY_MAGIC,
    PAYLOAD_BYTES_MAX,
    REPLY_ERROR_BIT,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

HELLO = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
REPLY = struct.Struct(">QIII")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
CONTEXT_ID = struct.Struct(">I")
REPLIES_MAX = 64
"""Most replies to one option; a server that sends more is not worth waiting for."""

REFUSALS: dict[int, tuple[Code, str]] = {
    Reply.ERR_UNKNOWN: (Code.NOT_FOUND, "the server has no such export"),
    Reply.ERR_POLICY: (Code.DENIED, "the server's policy forbids it"),
    Reply.ERR_SHUTDOWN: (Code.UNAVAILABLE, "the server is shutting down"),
    Reply.ERR_TLS_REQD: (Code.UNSUPPORTED, "the server wants TLS: nbds:// (which the kernel's driver does not speak)"),
    Reply.ERR_UNSUP: (Code.UNSUPPORTED, "the server knows no such option (it is too old)"),
}
"""What a refusal means to people; any other one is INVALID."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server tells about an export, and what was agreed with it; sizes in bytes."""

    size: int
    flags: TransmissionFlag
    block_min: int = 1
    block_preferred: int = BLOCK_PREFERRED_BYTES
    payload_max: int = PAYLOAD_BYTES_MAX
    structured: bool = False
    extended: bool = False
    allocation: int | None = None
    """The id of base:allocation, when it was selected."""
    fences: bool = False
    """The server knows claims, and holds the one that was made, if any."""


class Outclaimed(NvError):
    """The server refuses the claim: another host serves that leg, under a newer epoch."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What is asked for beyond the export. TLS is had or the haggling fails; the rest is as the server has it."""

    tls: bool = False
    structured: bool = False
    """Structured replies, extended headers, base:allocation, and to say that we know of claims."""
    claim: Claim | None = None
    """What is claimed, if the server knows that (`fences` tells)."""


class StartTls:
    """The server has acknowledged STARTTLS: its next bytes are TLS."""


Haggle = Generator[bytes | int | StartTls, bytes, ExportInfo]
"""Yields bytes to send or StartTls (answer with b""), or a count of bytes to be sent in; returns the facts."""


def haggle(name: str, *, enter: bool, wants: Wants | None = None) -> Haggle:
    """Ask for the export `name`, with the block sizes; with `enter` go on to the transmission phase.

    Without `enter` the option is INFO, followed by ABORT, and the caller closes the socket.
    Raises NvError: NOT_FOUND, DENIED, UNAVAILABLE, UNSUPPORTED by the server's refusal, INVALID when the peer
    does not speak the protocol; Outclaimed."""
    wants = wants or Wants()
    magic, second, offered = HELLO.unpack((yield HELLO.size))
    if magic != INIT_PASSWD or second != IHAVEOPT:
        raise _broken(f"its greeting is {magic:#018x} {second:#018x}")
    if not offered & HandshakeFlag.FIXED_NEWSTYLE:
        raise NvError(Code.UNSUPPORTED, f"the server is not fixed newstyle (handshake flags {offered:#x})")
    agreed = HandshakeFlag(offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
    greeting = struct.pack(">I", agreed)
    if wants.tls:
        reply, body = yield from _ask(Option.STARTTLS, b"", greeting)
        if reply != Reply.ACK:
            raise _no_tls(reply, body)
        yield StartTls()
        greeting = b""
    extended = structured = False
    allocation: int | None = None
    fences = False
    if wants.structured:
        reply, _ = yield from _ask(Option.EXTENDED_HEADERS, b"", greeting)
        extended, greeting = reply == Reply.ACK, b""
        if not extended:
            reply, _ = yield from _ask(Option.STRUCTURED_REPLY, b"")
            structured = reply == Reply.ACK
    encoded = _string(name)
    if extended or structured:
        allocation, fences = yield from _select_contexts(encoded, wants.claim)
    option = Option.GO if enter else Option.INFO
    payload = encoded + struct.pack(">HH", 1, Info.BLOCK_SIZE)
    yield greeting + OPTION.pack(IHAVEOPT, option, len(payload)) + payload
    infos = yield from _infos(option, name)
    if not enter:
        yield OPTION.pack(IHAVEOPT, Option.ABORT, 0)
    facts = _facts(infos)
    return replace(facts, structured=structured, extended=extended, allocation=allocation, fences=fences)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">I", len(encoded)) + encoded


def _ask(option: Option, payload: bytes, greeting: bytes = b"") -> Generator[bytes | int, bytes, tuple[int, bytes]]:
    """An option with one reply; errors are replies too."""
    yield greeting + OPTION.pack(IHAVEOPT, option, len(payload)) + payload
    return (yield from _reply(option))


def _select_contexts(name: bytes, claim: Claim | None) -> Generator[bytes | int, bytes, tuple[int | None, bool]]:
    """Select base:allocation and what is ours: its id, or None, and whether the server holds our claim."""
    ours = [EPOCH_CONTEXT] if claim is None else [EPOCH_CONTEXT, str(claim)]
    found = yield from _set_contexts(name, [BASE_ALLOCATION, *ours])
    if isinstance(found, _Refusal) and claim is not None and found.reply == Reply.ERR_POLICY:
        raise Outclaimed(Code.STALE, f"the server refuses the claim: {found.text}")
    if isinstance(found, _Refusal) and found.reply != Reply.ERR_UNSUP:  # it minds what it does not know
        found = yield from _set_contexts(name, [BASE_ALLOCATION])
    if isinstance(found, _Refusal):
        return None, False
    return found.get(BASE_ALLOCATION), all(context in found for context in ours)


@dataclass(frozen=True, slots=True)
class _Refusal:
    reply: int
    text: str


def _set_contexts(name: bytes, queries: list[str]) -> Generator[bytes | int, bytes, dict[str, int] | _Refusal]:
    """Ids of the contexts that the server selected, or its refusal."""
    payload = name + struct.pack(">I", len(queries)) + b"".join(map(_string, queries))
    yield OPTION.pack(IHAVEOPT, Option.SET_META_CONTEXT, len(payload)) + payload
    found: dict[str, int] = {}
    for _ in range(REPLIES_MAX):
        reply, body = yield from _reply(Option.SET_META_CONTEXT)
        if reply == Reply.META_CONTEXT:
            context = body[CONTEXT_ID.size :].decode(errors="replace")
            if context not in queries:
                raise _broken("it selected a meta context that was not asked for")
            (found[context],) = CONTEXT_ID.unpack_from(body)
        elif reply == Reply.ACK:
            return found
        elif reply & REPLY_ERROR_BIT:
            return _Refusal(reply, body.decode(errors="replace"))
    raise _broken(f"it sent more than {REPLIES_MAX} replies to one option")


def _infos(option: Option, name: str) -> Generator[bytes | int, bytes, dict[int, bytes]]:
    """What INFO or GO tells, by type."""
    infos: dict[int, bytes] = {}
    for _ in range(REPLIES_MAX):
        reply, body = yield from _reply(option)
        if reply == Reply.ACK:
            return infos
        if reply & REPLY_ERROR_BIT:
            raise _refusal(name, reply, body)
        if reply == Reply.INFO and len(body) >= 2:
            infos[int.from_bytes(body[:2], "big")] = body
    raise _broken(f"it sent more than {REPLIES_MAX} replies to one option")


def _reply(option: Option) -> Generator[bytes | int, bytes, tuple[int, bytes]]:
    magic, echoed, reply, length = REPLY.unpack((yield REPLY.size))
    if magic != OPTION_REPLY_MAGIC or echoed != option:
        raise _broken(f"its reply has magic {magic:#018x} and option {echoed}, not {option}")
    if length > OPTION_BYTES_MAX:
        raise _broken(f"its reply has {length} bytes, at most {OPTION_BYTES_MAX} are sensible")
    return reply, (yield length) if length else b""


def _facts(infos: dict[int, bytes]) -> ExportInfo:
    export = infos.get(Info.EXPORT)
    if export is None or len(export) != INFO_EXPORT.size:
        raise _broken("it did not tell the export's size")
    _, size, flags = INFO_EXPORT.unpack(export)
    sizes = infos.get(Info.BLOCK_SIZE)
    if sizes is None:
        return ExportInfo(size, TransmissionFlag(flags))
    if len(sizes) != INFO_BLOCK_SIZE.size:
        raise _broken(f"its block sizes have {len(sizes)} bytes")
    _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(sizes)
    if minimum == 0 or minimum & (minimum - 1) or minimum > 65536:
        raise _broken(f"its minimum block size is {minimum}")
    if maximum < minimum:
        raise _broken(f"its maximum payload of {maximum} is below its minimum block of {minimum}")
    return ExportInfo(size, TransmissionFlag(flags), minimum, preferred, maximum)


def _refusal(name: str, reply: int, body: bytes) -> NvError:
    code, meaning = REFUSALS.get(reply, (Code.INVALID, f"the server refused with error {reply & ~REPLY_ERROR_BIT}"))
    text = body.decode(errors="replace")
    return NvError(code, f"export {name!r}: {meaning}" + (f": {text}" if text else ""))


def _no_tls(reply: int, body: bytes) -> NvError:
    text = body.decode(errors="replace")
    return NvError(
        Code.UNSUPPORTED,
        f"the server does not start TLS (error {reply & ~REPLY_ERROR_BIT}" + (f": {text})" if text else ")"),
        "give it certificates or keys, or use nbd:// where nobody else is on the wire",
    )


def _broken(why: str) -> NvError:
    return NvError(Code.INVALID, f"the server does not speak NBD as it should: {why}")
