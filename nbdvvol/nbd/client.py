"""The client's side of the haggling, for the kernel's nbd driver: fixed newstyle, INFO or GO, simple replies.

Sans I/O: `haggle` is a generator that yields either bytes to send or the exact number of bytes it must be
given next. It never asks for a byte beyond the last answer, so that after GO the socket can go to the kernel
as it is. TLS, structured replies and meta contexts are not offered: the kernel's driver has none of them.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass

from nbdvvol.model.errors import Code, NvError
from nbdvvol.nbd.constants import (
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
REPLIES_MAX = 64
"""Most replies to one option; a server that sends more is not worth waiting for."""

REFUSALS: dict[int, tuple[Code, str]] = {
    Reply.ERR_UNKNOWN: (Code.NOT_FOUND, "the server has no such export"),
    Reply.ERR_POLICY: (Code.DENIED, "the server's policy forbids it"),
    Reply.ERR_SHUTDOWN: (Code.UNAVAILABLE, "the server is shutting down"),
    Reply.ERR_TLS_REQD: (Code.UNSUPPORTED, "the server wants TLS, which the kernel's driver does not speak"),
    Reply.ERR_UNSUP: (Code.UNSUPPORTED, "the server knows no such option (it is too old)"),
}
"""What a refusal means to people; any other one is INVALID."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server tells about an export; sizes in bytes."""

    size: int
    flags: TransmissionFlag
    block_min: int = 1
    block_preferred: int = BLOCK_PREFERRED_BYTES
    payload_max: int = PAYLOAD_BYTES_MAX


Haggle = Generator[bytes | int, bytes, ExportInfo]
"""Yields bytes to send (answer it with b"") or a count of bytes to be sent in; returns the facts."""


def haggle(name: str, *, enter: bool) -> Haggle:
    """Ask for the export `name`, with the block sizes; with `enter` go on to the transmission phase.

    Without `enter` the option is INFO, followed by ABORT, and the caller closes the socket.
    Raises NvError: NOT_FOUND, DENIED, UNAVAILABLE, UNSUPPORTED by the server's refusal, INVALID when the peer
    does not speak the protocol."""
    magic, second, offered = HELLO.unpack((yield HELLO.size))
    if magic != INIT_PASSWD or second != IHAVEOPT:
        raise _broken(f"its greeting is {magic:#018x} {second:#018x}")
    if not offered & HandshakeFlag.FIXED_NEWSTYLE:
        raise NvError(Code.UNSUPPORTED, f"the server is not fixed newstyle (handshake flags {offered:#x})")
    agreed = HandshakeFlag(offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
    option = Option.GO if enter else Option.INFO
    encoded = name.encode()
    payload = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, Info.BLOCK_SIZE)
    yield struct.pack(">I", agreed) + OPTION.pack(IHAVEOPT, option, len(payload)) + payload

    infos: dict[int, bytes] = {}
    for _ in range(REPLIES_MAX):
        reply, body = yield from _reply(option)
        if reply == Reply.ACK:
            break
        if reply & REPLY_ERROR_BIT:
            raise _refusal(name, reply, body)
        if reply == Reply.INFO and len(body) >= 2:
            infos[int.from_bytes(body[:2], "big")] = body
    else:
        raise _broken(f"it sent more than {REPLIES_MAX} replies to one option")
    if not enter:
        yield OPTION.pack(IHAVEOPT, Option.ABORT, 0)
    return _facts(infos)


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
    return ExportInfo(size, TransmissionFlag(flags), minimum, preferred, maximum)


def _refusal(name: str, reply: int, body: bytes) -> NvError:
    code, meaning = REFUSALS.get(reply, (Code.INVALID, f"the server refused with error {reply & ~REPLY_ERROR_BIT}"))
    text = body.decode(errors="replace")
    return NvError(code, f"export {name!r}: {meaning}" + (f": {text}" if text else ""))


def _broken(why: str) -> NvError:
    return NvError(Code.INVALID, f"the server does not speak NBD as it should: {why}")
